"""Settings that select matrices, and the method and form of their compression."""

from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.settings.presets import PAPER, PRESET_SETTINGS, PRESETS, Preset, by_preset
from pipeline.settings.validation import CommaList, Option, Regex, Settings, Width

if TYPE_CHECKING:
    from swsc_core.method.spec import Spec

# Headings of the flags in help and docs/cli.md.
_MATRICES, _BUDGET = "matrices to compress", "method and bit budget"
_PAPER, _RTN = "form of SWSC (--preset paper)", "round to nearest (--method rtn)"

# Settings that change what clusters and rank cost.
_NOT_IN_BUDGET = frozenset({"segment_size", "codebooks", "scaled", "centroid_bits", "factor_bits"})
# Fields of specs that are not settings of one method.
_SHARED_FIELDS = {"method", "bits"}

# Methods that help and completion list; swsc_core may have more.
BuiltInMethod = Literal["swsc", "rtn"]


def _require_method(value: str) -> str:
    """Return the name of a method of swsc_core; raise ValueError for any other name."""
    from swsc_core.compressed.registry import method_names  # here, because it imports torch, and --help must not

    if value not in (names := method_names()):
        raise ValueError(f"choose {' or '.join(map(repr, names))}")
    return value


Method = Annotated[BuiltInMethod | str, AfterValidator(_require_method)]


class MatrixSettings(Settings):
    """Which matrices are compressed, and how."""

    groups: ClassVar[tuple[str, ...]] = (_BUDGET, _MATRICES, _PAPER, _RTN)
    method: Method = Field("swsc", description="Compression method: SWSC, or its round-to-nearest (RTN) baseline.")
    preset: Literal["paper", "best", "fast", "data-free"] = Field(
        "paper",
        description="Configuration of SWSC: paper is the published method; best and fast choose the form of every"
        " matrix by calibration, within --bits; data-free is best, calibrated on text that the model generates.",
    )
    bits: Annotated[
        float | None, Option("BITS", default=f"{PAPER.bits:g} with preset paper, required with the others")
    ] = Field(None, gt=0, le=32, description="Bit budget in bits per weight; for RTN, the width of a code (2 to 8).")
    count: Annotated[Literal["true", "paper"] | None, Option(group=_PAPER, default="true with --bits, else paper")] = (
        Field(None, description="What --bits counts: stored bytes (true), or bits as in Table II of the paper (paper).")
    )
    cluster_share: Annotated[float, Option("SHARE", group=_PAPER)] = Field(
        0.5, ge=0, le=1, description="Share of the bit budget for the clusters; the low-rank factors get the rest."
    )
    clusters: Annotated[int | None, Option("K", group=_PAPER, default="from the bit budget")] = Field(
        None, ge=0, description="Number of clusters, in place of --bits."
    )
    rank: Annotated[int | None, Option("R", group=_PAPER, default="from the bit budget")] = Field(
        None, ge=0, description="Rank of the SVD compensation, in place of --bits."
    )
    channel_axis: Annotated[Literal["output", "input", "auto"], Option(group=_PAPER)] = Field(
        "output",
        description="Which channels are clustered: rows of the weight (output), columns (input), or those with the"
        " smaller error at equal stored bits (auto).",
    )
    n_init: Annotated[int | None, Option(group=_PAPER, default="16, or 4 for large matrices")] = Field(
        None, ge=1, le=1000, description="Number of K-Means initializations."
    )
    metric: Annotated[Literal["weights", "activations"], Option(group=_PAPER)] = Field(
        "weights",
        description="Error to minimize: squared error of the weights, or of the layer outputs on the --calibration text"
        " (activations).",
    )
    segment_size: Annotated[int | None, Option(group=_PAPER, default="the whole channel")] = Field(
        None,
        ge=1,
        description="Weights per segment, for vector quantization of channel segments; needs --clusters or --rank.",
    )
    codebooks: Annotated[int, Option(group=_PAPER)] = Field(
        1,
        ge=1,
        description="Number of codebooks: the rows are split into as many groups, each with --clusters centroids.",
    )
    scaled: Annotated[bool, Option(group=_PAPER)] = Field(
        False, description="Divide each row by its root mean square before clustering, and store the scale."
    )
    feedback: Annotated[bool, Option(group=_PAPER)] = Field(
        False,
        description="Compensate the error of each block of columns in the columns that are not quantized yet, as GPTQ"
        " does; needs --metric activations and --segment-size.",
    )
    rounds: Annotated[int | None, Option(default=by_preset("rounds"))] = Field(
        None,
        ge=0,
        le=100,
        description="Maximum number of refinement rounds: refit the centroids, reassign the segments, recompute the"
        " SVD.",
    )
    centroid_bits: Annotated[Width | None, Option(group=_PAPER, default="those of --storage-dtype")] = Field(
        None, description="Bits per stored centroid value."
    )
    factor_bits: Annotated[Width | None, Option(group=_PAPER, default="those of --storage-dtype")] = Field(
        None, description="Bits per stored value of the low-rank factors."
    )
    bits_over: Literal["selected", "model"] = Field(
        "selected",
        description="What --bits averages over: the selected matrices or the whole model; not with preset paper.",
    )
    allocation: Literal["measured", "uniform"] = Field(
        "measured",
        description="Distribution of the bits: by measured sensitivity, or equal for all matrices; not with preset"
        " paper.",
    )
    tune: Annotated[int | None, Option(default=by_preset("epochs"))] = Field(
        None,
        ge=0,
        le=100,
        description="Passes over the calibration text that tune the stored values of all matrices, so that the model"
        " predicts what the original predicts.",
    )
    projectors: Annotated[CommaList | None, Option("ROLES", group=_MATRICES, default="q,k, or none with --include")] = (
        Field(
            None, description="Roles of the matrices to compress, comma-separated, among q,k,v,o,gate,up,down,experts."
        )
    )
    include: Annotated[Regex, Option("REGEX", group=_MATRICES)] = Field(
        None, description="Regular expression: also compress the tensors whose name it matches."
    )
    exclude: Annotated[Regex, Option("REGEX", group=_MATRICES)] = Field(
        None, description="Regular expression: do not compress the tensors whose name it matches."
    )
    granularity: Annotated[Literal["tensor", "channel", "group"], Option(group=_RTN)] = Field(
        "channel",
        description="Which weights share one scale: all of a tensor, those of a channel, or a group within it.",
    )
    group_size: Annotated[int, Option(group=_RTN)] = Field(
        128, ge=1, description="Weights per group, with --granularity group."
    )
    symmetric: Annotated[bool, Option(group=_RTN)] = Field(
        False, description="Quantize symmetrically, without zero points."
    )
    storage_dtype: Annotated[Literal["float32", "float16", "bfloat16"] | None, Option(default="the checkpoint's")] = (
        Field(None, description="Data type of the stored centroids, factors and scales.")
    )
    seed: int = Field(0, ge=0, description="Random seed of the run.")

    @model_validator(mode="after")
    def _require_consistency(self) -> Self:
        from swsc_core.compressed.registry import method_named  # here, because it imports torch, and --help must not

        spec_type = method_named(self.method).spec_type
        mistakes = self._settings_of_other_methods()
        if "group_size" in self.model_fields_set and self.granularity != "group":
            mistakes.append("group_size: applies to granularity group only (add it, or omit group_size)")
        if spec_type.has_presets:
            mistakes += self._preset_mistakes() if self.preset_definition.allocates else self._paper_mistakes()
        elif self.preset_definition is not PAPER:
            mistakes.append(
                f"preset: {self.preset} is not applicable to method {self.method} (omit, or choose method swsc)"
            )
        try:
            spec_type.require_bits(self.bits)
        except ValueError as error:
            mistakes.append(str(error))
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _settings_of_other_methods(self) -> list[str]:
        from swsc_core.compressed.registry import method_named, method_names

        by_method = {name: _settings_of(method_named(name).spec_type) for name in method_names()}
        foreign = self.model_fields_set & frozenset().union(*by_method.values()) - by_method[self.method]
        return _refused(foreign, f"not applicable to method {self.method} (omit, or choose another --method)")

    def _paper_mistakes(self) -> list[str]:
        """Mistakes in a spec that is given by --clusters and --rank, or by the paper's split of a bit budget."""
        given = self.model_fields_set
        in_numbers = self.clusters is not None or self.rank is not None
        mistakes = self._mistakes_beside_clusters_or_rank() if in_numbers else self._mistakes_in_budget()
        if self.feedback and self.metric == "weights":
            mistakes.append("feedback: needs metric activations (add it, or omit feedback)")
        elif self.feedback and self.segment_size is None:
            mistakes.append(
                "feedback: passes errors between blocks of columns, which need segment_size (add it, or omit feedback)"
            )
        ignored = self.preset_definition.ignores & given
        return mistakes + _refused(ignored, f"not applicable to preset {self.preset} (omit, or choose another preset)")

    def _mistakes_in_budget(self) -> list[str]:
        """Mistakes in the paper's form of a bit budget."""
        refused = _NOT_IN_BUDGET & self.model_fields_set
        return _refused(
            refused, "needs clusters and rank (a bit budget of preset paper counts whole channels in 16 bits)"
        )

    def _mistakes_beside_clusters_or_rank(self) -> list[str]:
        """Mistakes beside given numbers of clusters and rank."""
        mistakes = _refused(
            {"count", "cluster_share"} & self.model_fields_set,
            "not applicable beside clusters or rank (omit, or give bits instead of them)",
        )
        if self.bits is not None:
            mistakes.append("bits: given beside clusters or rank (give a budget or the numbers, not both)")
        elif not self.clusters and not self.rank:
            mistakes.append("clusters, rank: both are zero, which stores nothing (raise one of them)")
        defaults = type(self).model_fields
        changed = {name for name in (*_NOT_IN_BUDGET, "n_init") if getattr(self, name) != defaults[name].default}
        return mistakes + self._mistakes_in_form(changed)

    def _mistakes_in_form(self, changed: set[str]) -> list[str]:
        """Mistakes among the `changed` settings beside numbers of clusters and rank."""
        mistakes = []
        if not self.clusters:
            mistakes += _refused(changed - {"factor_bits"}, "not applicable without clusters (omit, or add clusters)")
        if not self.rank:
            mistakes += _refused(changed & {"factor_bits"}, "not applicable without rank (omit, or add rank)")
        if self.channel_axis == "auto" and (refused := sorted(_NOT_IN_BUDGET & changed)):
            mistakes.append(
                "channel_axis: auto compares whole channels in 16 bits"
                f" (choose output or input with {', '.join(refused)})"
            )
        if "n_init" in changed and changed & {"segment_size", "codebooks"}:
            mistakes.append(
                "n_init: applies to one codebook of whole channels (omit it beside segment_size or codebooks)"
            )
        return mistakes

    def _preset_mistakes(self) -> list[str]:
        """Mistakes beside a preset that chooses the form of each matrix."""
        chosen = self.preset_definition.chooses & self.model_fields_set
        mistakes = _refused(chosen, f"chosen by preset {self.preset} (omit, or choose preset paper)")
        if self.bits is None and self.preset_definition.bits is None:
            mistakes.append(f"bits: required by preset {self.preset} (give the budget in bits per weight)")
        return mistakes

    @property
    def preset_definition(self) -> Preset:
        """The object that defines the preset."""
        return PRESETS[self.preset]

    @property
    def budget_bits(self) -> float:
        """--bits, or the default budget of the preset; raises ValueError if there is neither."""
        bits = self.preset_definition.bits if self.bits is None else self.bits
        if bits is None:
            raise ValueError(f"preset {self.preset} requires bits")
        return bits

    @property
    def max_rounds(self) -> int:
        """Maximum number of refinement rounds."""
        return self.preset_definition.rounds if self.rounds is None else self.rounds

    @property
    def needs_hessians(self) -> bool:
        """Whether Hessians (second moments of layer inputs) are required."""
        return self.preset_definition.allocates or self.metric == "activations"

    @property
    def epochs(self) -> int:
        """Tuning passes over the calibration text."""
        return self.preset_definition.epochs if self.tune is None else self.tune

    @property
    def needs_calibration(self) -> bool:
        """Whether a calibration text is required."""
        return self.needs_hessians or self.epochs > 0


def _refused(names: Collection[str], reason: str) -> list[str]:
    """The message that settings `names` are refused, or no message if there are none."""
    return [f"{', '.join(sorted(names))}: {reason}"] if names else []


def _settings_of(spec_type: "type[Spec]") -> frozenset[str]:
    """Names of the settings that apply to a method, beyond those that apply to all."""
    if spec_type.has_presets:
        return PRESET_SETTINGS
    return frozenset(field.name for field in fields(spec_type)) - _SHARED_FIELDS  # type: ignore[arg-type]

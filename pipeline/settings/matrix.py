"""Settings that say which matrices are compressed, and how: flags and keys of configuration files as those of config.py are."""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from pipeline.settings.presets import PAPER, PRESETS, Preset
from pipeline.settings.validation import CommaList, Option, Regex, Settings, Width

# headings of the flags in help and docs/cli.md
_MATRICES, _BUDGET = "matrices to compress", "method and bit budget"
_PAPER, _RTN = "form of SWSC (--preset paper)", "round to nearest (--method rtn)"

BuiltIn = Literal["swsc", "rtn"]


def _known_method(value: str) -> str:
    """The name of a method of swsc_core; ValueError for any other."""
    if value not in get_args(BuiltIn):
        from swsc_core.compressed.registry import method_names  # needs torch, help does not

        if value not in (names := method_names()):
            raise ValueError(f"choose {' or '.join(map(repr, names))}")
    return value


Method = Annotated[BuiltIn | str, AfterValidator(_known_method)]

# settings that one method alone understands
_ONLY_FOR = {
    "swsc": {
        "clusters", "rank", "cluster_share", "channel_axis", "n_init", "count", "metric", "segment_size", "codebooks",
        "scaled", "feedback", "rounds", "centroid_bits", "factor_bits", "bits_over", "allocation", "tune",
    },
    "rtn": {"granularity", "group_size", "symmetric"},
}  # fmt: skip
# settings that change what clusters and rank cost
_BESIDE_NUMBERS = {"segment_size", "codebooks", "scaled", "centroid_bits", "factor_bits"}


class MatrixSettings(Settings):
    """Which matrices are compressed, and how."""

    groups: ClassVar[tuple[str, ...]] = (_BUDGET, _MATRICES, _PAPER, _RTN)
    method: Method = Field("swsc", description="Compression method: SWSC, or its round-to-nearest (RTN) baseline.")
    preset: Literal["paper", "best", "fast", "data-free"] = Field(
        "paper",
        description="Configuration of SWSC: paper is the published method; best and fast choose the form of every matrix"
        " by calibration, within --bits; data-free is best, calibrated on text that the model generates.",
    )
    bits: Annotated[float | None, Option("BITS", default="3 with preset paper, required with the others")] = Field(
        None, gt=0, le=32, description="Bit budget in bits per weight; for RTN, the width of a code (2 to 8)."
    )
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
        description="Which channels are clustered: rows of the weight (output), columns (input), or those with the smaller"
        " error at equal stored bits (auto).",
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
        None, ge=1, description="Weights per segment, for vector quantization of channel segments."
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
        description="Compensate the error of each block of columns in the columns that are not quantized yet, as GPTQ does;"
        " needs --metric activations and --segment-size.",
    )
    rounds: Annotated[int | None, Option(default="paper 0, fast 1, best and data-free 4")] = Field(
        None,
        ge=0,
        le=100,
        description="Maximum number of refinement rounds: refit the centroids, reassign the segments, recompute the SVD.",
    )
    centroid_bits: Annotated[Width | None, Option(group=_PAPER, default="those of --storage-dtype")] = Field(
        None, description="Bits per stored centroid value."
    )
    factor_bits: Annotated[Width | None, Option(group=_PAPER, default="those of --storage-dtype")] = Field(
        None, description="Bits per stored value of the low-rank factors."
    )
    bits_over: Literal["selected", "model"] = Field(
        "selected",
        description="What --bits averages over: the selected matrices or the whole model; not for preset paper.",
    )
    allocation: Literal["measured", "uniform"] = Field(
        "measured",
        description="Distribution of the bits: by measured sensitivity, or equal for all matrices; not for preset paper.",
    )
    tune: Annotated[int | None, Option(default="best and data-free 1, others 0")] = Field(
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
    def _consistent(self) -> Self:
        wrong = []
        others = (names for method, names in _ONLY_FOR.items() if method != self.method)
        foreign = sorted(self.model_fields_set & set().union(*others))
        if foreign:
            wrong.append(
                f"{', '.join(foreign)} mean nothing to method {self.method}: drop them, or choose another --method"
            )
        if "group_size" in self.model_fields_set and self.granularity != "group":
            wrong.append("group_size counts with granularity group only: add it, or drop group_size")
        checks = {"swsc": self._of_swsc, "rtn": self._of_rtn}
        wrong += checks.get(self.method, self._of_one_preset)()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _of_swsc(self) -> list[str]:
        return self._allocated() if self.means.allocates else self._of_the_paper()

    def _of_rtn(self) -> list[str]:
        wrong = self._of_one_preset()
        if self.bits is not None and self.bits not in range(2, 9):
            wrong.append(f"bits {self.bits:g} is out of range for rtn: choose a whole number from 2 to 8")
        return wrong

    def _of_one_preset(self) -> list[str]:
        """What a method refuses for which specs are settings alone: presets that choose specs matrix by matrix."""
        if self.means is PAPER:
            return []
        return [f"preset {self.preset} means nothing to method {self.method}: drop it, or choose method swsc"]

    def _of_the_paper(self) -> list[str]:
        """What does not fit a spec that is given in numbers, or by the paper's split of a budget."""
        wrong = []
        given, explicit = self.model_fields_set, self.clusters is not None or self.rank is not None
        if explicit and (idle := sorted({"count", "cluster_share"} & given)):
            wrong.append(f"{', '.join(idle)} mean nothing beside clusters or rank: drop them, or give bits")
        if explicit and self.bits is not None:
            wrong.append("bits stands beside clusters or rank: give a budget or the numbers, not both")
        elif explicit and not self.clusters and not self.rank:
            wrong.append("clusters and rank are both zero, which stores nothing: raise one of them")
        if not explicit and (odd := sorted(_BESIDE_NUMBERS & given)):
            wrong.append(f"{', '.join(odd)} want clusters and rank: a paper budget counts whole channels in 16 bits")
        wrong += self._of_numbers() if explicit else []
        if self.feedback and self.metric == "weights":
            wrong.append("feedback works in metric activations only: add metric activations, or drop it")
        elif self.feedback and self.segment_size is None:
            wrong.append("feedback goes from one block of columns to the next: add segment_size, or drop it")
        if idle := sorted(self.means.ignores & given):
            wrong.append(f"{', '.join(idle)} mean nothing to preset {self.preset}: choose another preset, or drop them")
        return wrong

    def _of_numbers(self) -> list[str]:
        """What has no meaning beside these clusters and this rank."""
        wrong = []
        known = type(self).model_fields
        changed = {name for name in {*_BESIDE_NUMBERS, "n_init"} if getattr(self, name) != known[name].default}
        if not self.clusters and (idle := sorted(changed - {"factor_bits"})):
            wrong.append(f"{', '.join(idle)} mean nothing without clusters: add clusters, or drop them")
        if not self.rank and "factor_bits" in changed:
            wrong.append("factor_bits mean nothing without rank: add rank, or drop them")
        if self.channel_axis == "auto" and (odd := sorted(_BESIDE_NUMBERS & changed)):
            wrong.append(
                f"channel_axis auto compares whole channels in 16 bits: choose output or input beside {', '.join(odd)}"
            )
        if "n_init" in changed and changed & {"segment_size", "codebooks"}:
            wrong.append("n_init counts for one codebook of whole channels: drop it beside segment_size or codebooks")
        return wrong

    def _allocated(self) -> list[str]:
        """What does not fit a preset that chooses by itself."""
        wrong = []
        if idle := sorted(self.means.chooses & self.model_fields_set):
            wrong.append(f"{', '.join(idle)} are chosen by preset {self.preset}: drop them, or choose preset paper")
        if self.bits is None and self.means.bits is None:
            wrong.append(f"preset {self.preset} wants bits: give the budget in bits a weight")
        return wrong

    @property
    def means(self) -> Preset:
        """What the preset means."""
        return PRESETS[self.preset]

    @property
    def budget_bits(self) -> float:
        """--bits, or the preset's own budget; ValueError if there is neither."""
        bits = self.means.bits if self.bits is None else self.bits
        if bits is None:
            raise ValueError(f"preset {self.preset} wants bits")
        return bits

    @property
    def max_rounds(self) -> int:
        """Rounds of refitting and reassigning at most."""
        return self.means.rounds if self.rounds is None else self.rounds

    @property
    def with_moments(self) -> bool:
        """Whether second moments are needed."""
        return self.means.allocates or self.metric == "activations"

    @property
    def epochs(self) -> int:
        """Passes of tuning over the calibration text."""
        return self.means.epochs if self.tune is None else self.tune

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text is needed."""
        return self.with_moments or self.epochs > 0

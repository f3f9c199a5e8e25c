"""Settings that say which matrices are compressed, and how: flags and keys of configuration files as those of config.py are."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.validation import CommaList, Regex, Settings, Width

# settings that one method alone understands
_ONLY_FOR = {
    "swsc": {
        "clusters", "rank", "cluster_share", "channel_axis", "n_init", "count", "metric", "segment_size", "codebooks",
        "scaled", "feedback", "rounds", "centroid_bits", "factor_bits", "bits_over", "allocation", "tune",
    },
    "rtn": {"granularity", "group_size", "symmetric"},
}  # fmt: skip
# settings that presets other than "paper" choose by themselves, matrix by matrix
_CHOSEN = {
    "clusters", "rank", "cluster_share", "channel_axis", "n_init", "count", "metric", "segment_size", "codebooks", "scaled",
    "feedback", "centroid_bits", "factor_bits",
}  # fmt: skip
# settings that change what clusters and rank cost
_BESIDE_NUMBERS = {"segment_size", "codebooks", "scaled", "centroid_bits", "factor_bits"}
_TUNED = {"best": 1, "data-free": 1}  # times, by preset


class MatrixSettings(Settings):
    """Which matrices are compressed, and how."""

    method: Literal["swsc", "rtn"] = Field("swsc", description="the paper's method, or its round-to-nearest baseline")
    preset: Literal["paper", "best", "fast", "data-free"] = Field(
        "paper",
        description="paper: its form, 3 bits as it counts them unless told; best, fast: --bits alone, all else is chosen by"
        " calibration; data-free: as best, calibrated on text that the model writes itself",
    )
    bits: float | None = Field(None, gt=0, le=32, description="budget in bits a weight (rtn: width of a code, 2-8)")
    count: Literal["true", "paper"] | None = Field(
        None,
        description="what bits count: true = stored bytes (default with --bits), paper = Table II (default without)",
    )
    cluster_share: float = Field(0.5, ge=0, le=1, description="share of the bits that goes to clusters")
    clusters: int | None = Field(None, ge=0, description="number of clusters k; in place of --bits")
    rank: int | None = Field(None, ge=0, description="rank r of the compensation; in place of --bits")
    channel_axis: Literal["output", "input", "auto"] = Field(
        "output", description="channels are rows (output) or columns (input); auto: smaller error at equal true bits"
    )
    n_init: int | None = Field(
        None, ge=1, le=1000, description="starts of K-Means (default: 16, or 4 for large matrices)"
    )
    metric: Literal["weights", "activations"] = Field(
        "weights", description="squared errors of the weights (the paper), or of the layers' outputs (--calibration)"
    )
    segment_size: int | None = Field(
        None, ge=1, description="weights of a channel that share on their own (default: the whole channel, the paper)"
    )
    codebooks: int = Field(1, ge=1, description="groups of rows that have a codebook of --clusters centroids each")
    scaled: bool = Field(False, description="divide each row by a scale of its own before it shares")
    feedback: bool = Field(False, description="feed the error of each block of columns into the columns before it")
    rounds: int | None = Field(
        None,
        ge=0,
        le=100,
        description="most rounds of refitting, reassigning and decomposing again (default: preset's)",
    )
    centroid_bits: Width | None = Field(None, description="width of stored centroids (default: the storage dtype's)")
    factor_bits: Width | None = Field(None, description="width of stored factors (default: the storage dtype's)")
    bits_over: Literal["selected", "model"] = Field(
        "selected", description="but for paper: what --bits is the average of, selected matrices or the whole model"
    )
    allocation: Literal["measured", "uniform"] = Field(
        "measured", description="but for paper: bits by measured sensitivity, or the same for every matrix"
    )
    tune: int | None = Field(
        None,
        ge=0,
        le=100,
        description="times that stored values are tuned on the calibration text, all matrices together (default: preset's)",
    )
    projectors: CommaList | None = Field(None, description="roles of the matrices to compress (default q,k)")
    include: Regex = Field(None, description="regular expression of tensor names to compress")
    exclude: Regex = Field(None, description="regular expression of tensor names to leave alone")
    granularity: Literal["tensor", "channel", "group"] = Field("channel", description="rtn: what shares one scale")
    group_size: int = Field(128, ge=1, description="rtn: weights that share a scale, with --granularity group")
    symmetric: bool = Field(False, description="rtn: no zero points")
    storage_dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, description="dtype of centroids, factors and scales (default: the source's)"
    )
    seed: int = Field(0, ge=0, description="seed of the run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = []
        foreign = sorted(self.model_fields_set & _ONLY_FOR[{"rtn": "swsc", "swsc": "rtn"}[self.method]])
        if foreign:
            wrong.append(
                f"{', '.join(foreign)} mean nothing to method {self.method}: drop them, or choose another --method"
            )
        if "group_size" in self.model_fields_set and self.granularity != "group":
            wrong.append("group_size counts with granularity group only: add it, or drop group_size")
        if self.method == "rtn":
            wrong += self._of_rtn()
        else:
            wrong += self._of_the_paper() if self.preset == "paper" else self._allocated()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _of_rtn(self) -> list[str]:
        wrong = []
        if self.bits is not None and self.bits not in range(2, 9):
            wrong.append(f"bits {self.bits:g} is out of range for rtn: choose a whole number from 2 to 8")
        if self.preset != "paper":
            wrong.append(f"preset {self.preset} means nothing to method rtn: drop it, or choose method swsc")
        return wrong

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
        if idle := sorted({"bits_over", "allocation"} & given):
            wrong.append(f"{', '.join(idle)} mean nothing to preset paper: choose another preset, or drop them")
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
        if idle := sorted(_CHOSEN & self.model_fields_set):
            wrong.append(f"{', '.join(idle)} are chosen by preset {self.preset}: drop them, or choose preset paper")
        if self.bits is None:
            wrong.append(f"preset {self.preset} wants bits: give the budget in bits a weight")
        return wrong

    @property
    def with_moments(self) -> bool:
        """Whether second moments are needed."""
        return self.preset != "paper" or self.metric == "activations"

    @property
    def epochs(self) -> int:
        """Times that stored values are tuned on the calibration text."""
        return self.tune if self.tune is not None else _TUNED.get(self.preset, 0)

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text is needed."""
        return self.with_moments or self.epochs > 0

"""Every setting, once: fields here are flags of the command line and keys of configuration files alike."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.matrix_config import MatrixSettings
from pipeline.validation import CommaList, Settings

_TEXT = "text file, table (.jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst, .xz, .bz2) or Hub data set NAME[:CONFIG[:SPLIT]]"
_COLUMN = Field(
    None, min_length=1, description="column of a table that holds the text (default: text, or the only one of strings)"
)


class LoadSettings(Settings):
    """How a model is loaded, to be calibrated or measured."""

    trust_remote_code: bool = Field(
        False, description="run the Python code that the model brings along, if it does; read that code first"
    )


class CalibrationSettings(LoadSettings):
    """Text that second moments are gathered on."""

    calibration: str | None = Field(None, description=f"{_TEXT}, to calibrate on (split by default: train)")
    text_column: str | None = _COLUMN
    calibration_windows: int = Field(128, ge=1, description="windows of the calibration text")
    calibration_seqlen: int = Field(512, ge=2, description="tokens of a calibration window")
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the model while it is calibrated; auto: as in evaluation"
    )
    gradient_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of gradient-weighted tokens in the second moments; the rest counts all alike",
    )
    moment_gib: float = Field(
        4.0, gt=0, description="GiB of second moments a worker holds at a time; less: more passes"
    )
    cache_dir: str | None = Field(
        None, description="directory of all nodes where moments are kept (default: .swsc-cache beside the output)"
    )


class CompressSettings(MatrixSettings):
    """A compression of one model."""

    format: Literal["swsc", "dense"] = Field("swsc", description="compact form, or restored weights for stock loaders")


class OutputSettings(Settings):
    """How an output is begun; what it will hold does not depend on it."""

    overwrite: bool = Field(False, description="replace an output of other settings, or a damaged one")
    require_coverage: float | None = Field(
        None,
        gt=0,
        le=1,
        description="refuse to begin if a smaller share of the model's weights than this is compressed",
    )


class SourceSettings(Settings):
    """How sure one wants to be that a model is the one that was published."""

    verify_source: str | None = Field(
        None,
        min_length=1,
        description="first hold the model's weight files against known sha256: hub (as the Hub publishes them), or a file as"
        " `sha256sum` writes it",
    )


class PushSettings(Settings):
    """Where on the Hub an output goes."""

    private: bool = Field(
        False, description="make the repository a private one; one that is there and public is refused"
    )
    revision: str | None = Field(None, min_length=1, description="branch to push to (default: main)")
    message: str | None = Field(None, min_length=1, description="message of the commit")


class MeasureSettings(LoadSettings):
    """How a model is run, whatever it is measured by."""

    batch_size: int = Field(1, ge=1, description="windows of a text, or requests of tasks, of one forward pass")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="arithmetic; auto: float32 on CPU, the checkpoint's own on GPU"
    )


class EvaluateSettings(MeasureSettings):
    """Perplexity by the standard protocol."""

    text: str = Field(description=f"{_TEXT} (split by default: test), or wikitext2 for its test split")
    text_column: str | None = _COLUMN
    seqlen: int = Field(2048, ge=2, description="tokens of a window")
    windows: int | None = Field(None, ge=1, description="first N windows only (default: all)")


class ClusterSettings(Settings):
    """Where the work is done."""

    address: str | None = Field(
        None, description="Ray cluster; local: one in-process (default: one that runs on this machine, else local)"
    )
    workers: int | None = Field(None, ge=1, description="number of workers (default: what CPUs, GPUs and memory hold)")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="at most 1; 0: calculate on CPUs (default: 1 where there are GPUs, else 0)"
    )
    gpu_type: str | None = Field(
        None, min_length=1, description="model of GPU where a cluster has several, as Ray calls it (A100)"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs, and so threads, of a worker; decides the last bit")
    task_deadline: float | None = Field(
        None,
        gt=0,
        description="seconds after which a task counts as hanging (default: by what its like took, 600 at least)",
    )
    elastic: bool = Field(
        False,
        description="the cluster grows on demand (Ray's autoscaler): ask for more workers than fit it now, and wait",
    )
    local: bool = Field(False, description="no Ray: a plain loop with the same bytes")

    @field_validator("gpus_per_worker")
    @classmethod
    def _one_at_most(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a worker calculates on one GPU at most: choose 1 or less; more workers use more GPUs")
        return gpus

    @property
    def threads_per_worker(self) -> int:
        """Threads of a worker; fixed, because LAPACK's results depend on their number in the last bit."""
        return max(1, int(self.cpus_per_worker))


class Variant(MatrixSettings):
    """One row of a sweep."""

    name: str = Field(min_length=1, description="unique name of the row")
    reference: dict[str, float | None] = Field({}, description="published perplexity of this row, by known model")


class SweepSettings(CalibrationSettings):
    """Models × variants × evaluations, run over one pool of workers."""

    models: CommaList = Field((), description="local directories; also by --model")
    variants: tuple[Variant, ...] = Field(min_length=1, description="what is done to each model")
    evaluations: tuple[EvaluateSettings, ...] = Field((), description="texts that every variant is measured on")
    uncompressed: bool = Field(True, description="also measure each model as it is")
    reference: dict[str, float | None] = Field({}, description="published perplexity of the uncompressed model")
    matrices: bool = Field(False, description="also print one row a matrix")
    keep_tuned: bool = Field(
        False, description="keep tuned models in the cache once they are measured, for a later sweep to find again"
    )

    @model_validator(mode="before")
    @classmethod
    def _trusted_alike(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A model whose code is run is run by every evaluation."""
        given = values.get("evaluations")
        if not values.get("trust_remote_code") or not isinstance(given, list | tuple):
            return values
        alike = [{"trust_remote_code": True, **one} if isinstance(one, dict) else one for one in given]
        return {**values, "evaluations": alike}

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1 or name == "uncompressed"})
        if twice:
            raise ValueError(f"variants share a name, or have a reserved one: {', '.join(twice)}")
        wanting = [v.name for v in self.variants if v.calibrated and v.preset != "data-free"]
        if wanting and self.calibration is None:
            raise ValueError(f"variants {', '.join(wanting)} want a calibration text: name it as calibration")
        again = sorted({model for model in self.models if self.models.count(model) > 1})
        if again:
            raise ValueError(f"models are named twice: {', '.join(again)}")
        return self

    def for_preset(self, preset: str) -> CalibrationSettings:
        """What a variant of `preset` is calibrated on."""
        return self.model_copy(update={"calibration": None}) if preset == "data-free" else self

"""Every setting, once: fields here are flags of the command line and keys of configuration files alike."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.settings.matrix import MatrixSettings
from pipeline.settings.validation import CommaList, Option, Settings

_TEXT = (
    "a text file, a table (.jsonl, .json, .csv, .tsv, .parquet), one of these compressed (.gz, .zst, .xz, .bz2), or a data set"
    " of the Hub as NAME[:CONFIG[:SPLIT]]"
)
_Column = Annotated[str | None, Option("NAME", default="text, or the only column of strings")]
_COLUMN = Field(None, min_length=1, description="Column that holds the text, where a text is a table.")
_MODEL, _OUTPUT = "loading the model", "output"


class LoadSettings(Settings):
    """How a model is loaded, to be calibrated or measured."""

    groups: ClassVar[tuple[str, ...]] = (_MODEL,)
    trust_remote_code: bool = Field(
        False,
        description="Allow transformers to run Python code that the model directory contains; read that code first.",
    )


class CalibrationSettings(LoadSettings):
    """Text that second moments are gathered on."""

    groups: ClassVar[tuple[str, ...]] = ("calibration",)
    calibration: Annotated[str | None, Option("TEXT")] = Field(
        None, description=f"Calibration text: {_TEXT} (split train if none is named)."
    )
    text_column: _Column = _COLUMN
    calibration_windows: int = Field(128, ge=1, description="Number of windows of the calibration text.")
    calibration_seqlen: int = Field(512, ge=2, description="Tokens per calibration window.")
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Data type of the model during calibration; auto is float32 on a CPU and the checkpoint's on a GPU.",
    )
    gradient_share: Annotated[float, Option("SHARE")] = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of gradient-weighted tokens in the Hessian (second moment of the inputs); 0 weights all tokens"
        " equally.",
    )
    moment_gib: Annotated[float, Option("GIB")] = Field(
        4.0,
        gt=0,
        description="Memory in GiB for the Hessians that a worker accumulates at a time; less takes more passes.",
    )
    cache_dir: Annotated[str | None, Option("DIR", default=".swsc-cache beside the output")] = Field(
        None, description="Directory, visible to all nodes, that keeps calibration results for later runs."
    )


class CompressSettings(MatrixSettings):
    """A compression of one model."""

    format: Annotated[Literal["swsc", "dense"], Option(group=_OUTPUT)] = Field(
        "swsc", description="Write the compressed weights (swsc), or restored weights that any loader opens (dense)."
    )


class OutputSettings(Settings):
    """How an output is begun; what it will hold does not depend on it."""

    groups: ClassVar[tuple[str, ...]] = (_OUTPUT,)
    overwrite: bool = Field(
        False, description="Replace an output that was written with other settings, or a damaged one."
    )
    require_coverage: Annotated[float | None, Option("SHARE")] = Field(
        None,
        gt=0,
        le=1,
        description="Stop before any work if less than this share of the model's weights would be compressed.",
    )


class SourceSettings(Settings):
    """How sure one wants to be that a model is the one that was published."""

    groups: ClassVar[tuple[str, ...]] = (_MODEL,)
    verify_source: Annotated[str | None, Option("hub|FILE")] = Field(
        None,
        min_length=1,
        description="Check the model's weight files against the sha256 that the Hub publishes (hub), or against a FILE as"
        " sha256sum writes it.",
    )


class PushSettings(Settings):
    """Where on the Hub an output goes."""

    groups: ClassVar[tuple[str, ...]] = ("Hugging Face Hub",)
    private: bool = Field(
        False, description="Create the repository as a private one; an existing public repository is refused."
    )
    revision: Annotated[str | None, Option("BRANCH", default="main")] = Field(
        None, min_length=1, description="Branch to push to."
    )
    message: Annotated[str | None, Option("MESSAGE")] = Field(None, min_length=1, description="Commit message.")


class MeasureSettings(LoadSettings):
    """How a model is run, whatever it is measured by."""

    groups: ClassVar[tuple[str, ...]] = ("running the model",)
    batch_size: int = Field(1, ge=1, description="Windows of text, or lm-eval requests, per forward pass.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Data type of the computation; auto is float32 on a CPU and the checkpoint's on a GPU."
    )


class EvaluateSettings(MeasureSettings):
    """Perplexity by the standard protocol."""

    groups: ClassVar[tuple[str, ...]] = ("perplexity",)
    text: Annotated[str, Option("TEXT")] = Field(
        description=f"Evaluation text: wikitext2 (its test split), {_TEXT} (split test if none is named)."
    )
    text_column: _Column = _COLUMN
    seqlen: Annotated[int, Option(default="2048, or the model's positions if fewer")] = Field(
        2048, ge=2, description="Tokens per window."
    )
    windows: Annotated[int | None, Option(default="all")] = Field(
        None, ge=1, description="Evaluate the first N windows only."
    )


class ClusterSettings(Settings):
    """Where the work is done."""

    groups: ClassVar[tuple[str, ...]] = ("workers and cluster",)
    address: Annotated[str | None, Option("ADDRESS", default="a cluster that runs on this machine, else local")] = (
        Field(None, description="Address of the Ray cluster; local starts one for this command.")
    )
    workers: Annotated[int | None, Option(default="as many as CPUs, GPUs and memory allow")] = Field(
        None, ge=1, description="Number of workers."
    )
    gpus_per_worker: Annotated[float | None, Option("F", default="1 if the cluster has GPUs, else 0")] = Field(
        None, ge=0, description="GPUs per worker, at most 1; 0.5 places two workers on a GPU, 0 computes on CPUs."
    )
    gpu_type: Annotated[str | None, Option("TYPE")] = Field(
        None, min_length=1, description="Ray's name of the GPU model to use (such as A100), if the cluster has several."
    )
    cpus_per_worker: Annotated[float, Option("F")] = Field(
        1, gt=0, description="CPUs, and so threads, per worker; results are identical to the bit for equal values only."
    )
    task_deadline: Annotated[
        float | None, Option("SECONDS", default="from the time of similar tasks, at least 600")
    ] = Field(None, gt=0, description="Time after which a task counts as hanging and its worker is replaced.")
    elastic: bool = Field(
        False,
        description="Request more workers than the cluster has room for, and wait for its autoscaler to add nodes.",
    )
    local: bool = Field(False, description="Run without Ray, in this process; the output is identical to the byte.")

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

    name: str = Field(min_length=1, description="Unique name of the row.")
    reference: dict[str, float | None] = Field({}, description="Published perplexity of this row, by model.")


class SweepSettings(CalibrationSettings):
    """Models × variants × evaluations, run over one pool of workers."""

    groups: ClassVar[tuple[str, ...]] = ("sweep",)
    models: CommaList = Field((), description="Models; --model replaces them.")
    variants: tuple[Variant, ...] = Field(min_length=1, description="Compressions of each model.")
    evaluations: tuple[EvaluateSettings, ...] = Field((), description="Texts that every variant is evaluated on.")
    uncompressed: bool = Field(True, description="Also evaluate each uncompressed model.")
    reference: dict[str, float | None] = Field(
        {}, description="Published perplexity of the uncompressed model, by model."
    )
    matrices: bool = Field(False, description="Also print one row per matrix.")
    keep_tuned: bool = Field(
        False, description="Keep tuned models in the cache after their evaluation, for a later sweep."
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
        wanting = [v.name for v in self.variants if v.calibrated and not v.means.generates_text]
        if wanting and self.calibration is None:
            raise ValueError(f"variants {', '.join(wanting)} want a calibration text: name it as calibration")
        again = sorted({model for model in self.models if self.models.count(model) > 1})
        if again:
            raise ValueError(f"models are named twice: {', '.join(again)}")
        return self

    def calibration_of(self, variant: Variant) -> CalibrationSettings:
        """How a variant is calibrated: without a text, if its preset generates one."""
        return self.model_copy(update={"calibration": None}) if variant.means.generates_text else self

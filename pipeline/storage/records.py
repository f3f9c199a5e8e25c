"""What the small JSON files of an output say, by type: they lie where anybody may edit, cut or damage them.

A file is checked when it is read, so that whoever reads it finds what it was written with, or learns in one line what is wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.errors import OutputError, UnusableOutput
from pipeline.storage.store import Store

T = TypeVar("T")

_SHOWN = 60  # characters of a value that is wrong
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 60)]
Bits = Annotated[float, Field(ge=0, le=1e6)]  # a weight
Figure = Annotated[
    float, Field(allow_inf_nan=True)
]  # a result, which may be none: what a half-precision model overflowed to


class Record(BaseModel):
    """Base of all: further keys are let through, since a later release may write them; numbers are finite and no strings."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class ManifestFileRecord(Record):
    """What a manifest says of a file."""

    size: Count
    sha256: Sha256
    tensors: dict[str, Sha256] = {}


class ManifestRecord(Record):
    """swsc_manifest.json."""

    format_version: int
    identity: dict[str, Any]
    files: dict[str, ManifestFileRecord]


class ReportRowRecord(Record):
    """What was done to a tensor; figures of one that was compressed."""

    name: str
    action: str
    reason: str
    shape: list[Count]
    bits_per_weight: Bits | None = None
    paper_bits: Bits | None = None
    relative_error: Figure | None = None
    source_sha256: dict[str, Sha256] = {}


class ReportRecord(Record):
    """swsc_report.json."""

    format: str
    tensors: list[ReportRowRecord]


class TuningRecord(Record):
    """What a tuning came to: its result in the cache, and a part of a report."""

    steps: Count
    divergence_before: Figure
    divergence_after: Figure
    applied: bool


class CompressionReportRecord(ReportRecord):
    """swsc_report.json of a compression."""

    compressed_bits_per_weight: float
    whole_model_bits_per_weight: float
    share_of_weights_compressed: float
    seconds: float
    files_of_an_earlier_run: Count
    tuning: TuningRecord | None = None


class CalibrationRecord(Record):
    """swsc_calibration.json."""

    text: str | None = None
    traces: list[str]


class FinishedRowRecord(Record):
    """A row of a report to be, of a matrix that is compressed already; a calibration writes others, without `entry`."""

    name: str
    entry: dict[str, Any] | None = None
    stored_bytes: Count = 0
    read_seconds: float = 0.0
    stats: dict[str, Figure | None] = {}
    bits_per_weight: Bits | None = None
    paper_bits: Bits | None = None
    relative_error: Figure | None = None
    source_sha256: dict[str, Sha256] = {}
    moments_sha256: Sha256 | None = None
    tuned_sha256: str | None = None
    tokens: Count = 0
    owner: str | None = None

    @model_validator(mode="after")
    def _is_one_of_either_kind(self) -> "FinishedRowRecord":
        from swsc_core.compressed.registry import entry_of

        said = self.model_fields_set
        of_a_matrix = self.entry is not None and {"stats", "stored_bytes", "read_seconds"} <= said
        if not (of_a_matrix or ({"tokens", "owner"} <= said and "entry" not in said)):
            raise ValueError("a row that says nothing of a matrix")
        if self.entry is not None:
            entry_of(self.entry)
        return self


class FinishedFileRecord(Record):
    """The record of a file that a run has finished."""

    size: Count
    sha256: Sha256
    run: str
    tensors: dict[str, Sha256] = {}
    rows: list[FinishedRowRecord]


class CalibrationRunRecord(Record):
    """.swsc/run.json of second moments."""

    windows: Annotated[list[Count], Field(min_length=2, max_length=2)]


class CalibrationSourceRecord(Record):
    """source.json of second moments: sha256 of what they were gathered from, by range of a file."""

    ranges: dict[str, Sha256]


class CurvesRecord(Record):
    """curves-….json of second moments: what a matrix loses, and what a spec leaves of that (flows/allocate.py)."""

    reach: dict[str, float]
    shares: dict[str, list[Annotated[list[Any], Field(min_length=2, max_length=2)]]]


class LeaseRecord(Record):
    """.swsc/lease.json: who writes."""

    owner: str
    machine: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^\S")] | None = None
    pid: Annotated[int, Field(gt=0, lt=1 << 31)] | None = None
    beat: int = 0


class EvaluationRecord(Record):
    """What `swsc evaluate --json` writes."""

    perplexity: float


class GgufOriginRecord(Record):
    """dequantized.json of a checkpoint that was made of a GGUF file."""

    file: str
    baseline: str
    licence: str
    types: dict[str, Count]


def check_record(kind: type[Record], value: Any) -> dict[str, Any]:
    """`value` itself, if it is such a record; ValueError that names the first thing that is not as it should be."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        shown = repr(first["input"])
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        raise ValueError(f"{place[:200]}: {first['msg']}, got {shown}" if place else first["msg"]) from None
    found: dict[str, Any] = value
    return found


def read_cached(store: Store, name: str, read: Callable[[], T]) -> T:
    """What `read` makes of a file in a cache, which is recomputed if it is removed; OutputError if it is damaged."""
    try:
        return read()
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise OutputError(
            f"{store.root}/{name} is damaged ({error}); remove it, and run the same command again"
        ) from None


@contextmanager
def report_damaged_cache(store: Store) -> Iterator[None]:
    """While entered, an error of an output that cannot be used has the remedy for a part of a cache: --overwrite is not for it."""
    try:
        yield
    except UnusableOutput as error:
        raise OutputError(
            f"{error.found}; it is a part of the cache: remove {store.root}, and run the same command again"
        ) from None


def read_record(store: Store, name: str, kind: type[Record], most: int | None = None) -> dict[str, Any]:
    """A JSON file of this kind; ValueError if it is another, FileNotFoundError if there is none."""
    return check_record(kind, store.read_json(name) if most is None else store.read_json(name, most))

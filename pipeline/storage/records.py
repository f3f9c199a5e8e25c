"""Schemas of the JSON files of outputs and caches, which are validated when they are read.

Anybody may edit, truncate or damage these files. A reader gets a valid record, or an error of one line that names the
first invalid value.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.errors import OutputError, UnusableOutput
from pipeline.storage.store import JSON_LIMIT, Store

T = TypeVar("T")

R = TypeVar("R", bound="Record")

# Characters of an invalid value, and of its key, in an error.
_VALUE_CHARACTERS, _KEY_CHARACTERS = 60, 200
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 60)]
# Bits per weight.
Bits = Annotated[float, Field(ge=0, le=1e6)]
# A measured value. NaN and Inf are valid: a model in half precision may overflow.
Figure = Annotated[float, Field(allow_inf_nan=True)]


class Record(BaseModel):
    """Base class.

    Unknown keys are accepted, since a later release may write them; numbers are finite and not strings.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class ManifestFileRecord(Record):
    """A file in a manifest."""

    size: Count
    sha256: Sha256
    tensors: dict[str, Sha256] = {}


class ManifestRecord(Record):
    """swsc_manifest.json."""

    format_version: int
    identity: dict[str, Any]
    files: dict[str, ManifestFileRecord]


class ReportRowRecord(Record):
    """A tensor in a report: its action, and the measured values of a compressed matrix."""

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
    """Result of a tuning, in the cache and in a report."""

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
    """A row in the record of a finished file.

    A compression writes the report row of a matrix and its `entry`; a calibration writes `tokens`, `owner` and
    `sha256`.
    """

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
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _require_keys_of_one_kind(self) -> "FinishedRowRecord":
        from swsc_core.compressed.registry import entry_of

        keys = self.model_fields_set
        is_matrix = self.entry is not None and {"stats", "stored_bytes", "read_seconds"} <= keys
        is_calibration = {"tokens", "owner"} <= keys and "entry" not in keys
        if not (is_matrix or is_calibration):
            raise ValueError("the row describes neither a compressed matrix nor a calibration")
        if self.entry is not None:
            entry_of(self.entry)
        return self


class FinishedFileRecord(Record):
    """.swsc/done/FILE.json: a file that a run has finished."""

    size: Count
    sha256: Sha256
    run: str
    tensors: dict[str, Sha256] = {}
    rows: list[FinishedRowRecord]


class CalibrationRunRecord(Record):
    """.swsc/run.json of a cache of Hessians: number and length of the calibration windows."""

    windows: Annotated[list[Count], Field(min_length=2, max_length=2)]


class CalibrationSourceRecord(Record):
    """source.json of a cache of Hessians: sha256 of each range of a file that they were computed from."""

    ranges: dict[str, Sha256]


class CurvesRecord(Record):
    """curves-….json of a cache of Hessians: sensitivity of each matrix, and its relative distortion under each spec."""

    reach: dict[str, float]
    shares: dict[str, list[Annotated[list[Any], Field(min_length=2, max_length=2)]]]


class LeaseRecord(Record):
    """.swsc/lease.json: the process that writes into a directory, and the number of its last renewal."""

    owner: str
    machine: Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^\S")] | None = None
    pid: Annotated[int, Field(gt=0, lt=1 << 31)] | None = None
    beat: int = 0


class EvaluationRecord(Record):
    """The file that `swsc evaluate --json` writes."""

    perplexity: float


class GgufOriginRecord(Record):
    """dequantized.json: the GGUF file that a checkpoint was converted from."""

    file: str
    baseline: str
    licence: str
    types: dict[str, Count]


def parse_record(kind: type[R], value: Any) -> R:
    """Convert a JSON value to a record; ValueError names the first invalid value."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])[:_KEY_CHARACTERS]
    shown = repr(first["input"])
    shown = shown if len(shown) <= _VALUE_CHARACTERS else f"{shown[:_VALUE_CHARACTERS]}…"
    raise ValueError(f"{key}: {first['msg']}, got {shown}" if key else first["msg"])


def check_record(kind: type[Record], value: Any) -> dict[str, Any]:
    """Return `value` if it is a valid record, as the JSON object that it is; ValueError as from `parse_record`."""
    parse_record(kind, value)
    json_object: dict[str, Any] = value
    return json_object


def read_record(store: Store, name: str, kind: type[Record], limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON file of at most `limit` bytes and check it.

    Raises:
        ValueError: it is not a valid record. FileNotFoundError: there is no such file.
    """
    return check_record(kind, store.read_json(name, limit))


def read_cached(store: Store, name: str, read: Callable[[], T]) -> T:
    """Call `read`, which reads the file `name` of a cache; OutputError if the file is damaged."""
    try:
        return read()
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise OutputError(
            f"{store.root}/{name} is damaged ({error}); remove it, and run the same command again"
        ) from None


@contextmanager
def report_damaged_cache(store: Store) -> Iterator[None]:
    """Translate UnusableOutput, whose remedy is --overwrite, into an OutputError with the remedy for a cache."""
    try:
        yield
    except UnusableOutput as error:
        raise OutputError(
            f"{error.problem}; it is part of a cache: remove {store.root}, and run the same command again"
        ) from None

"""Rows of swsc_report.json for compressed matrices, and the results that workers return for them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import entry_of

# Keys that a row has only where they apply.
_OPTIONAL = ("calibration_tokens", "moments_sha256", "tuned_sha256")

JsonRow = dict[str, Any]
"""A row of a report as JSON, or a whole report. Rows of earlier releases may lack keys."""


@dataclass(frozen=True)
class CompressedRow:
    """Measurements of one compressed matrix. Bits are counted from the stored bytes.

    Attributes:
        relative_error: ‖W − Ŵ‖²_F / ‖W‖²_F.
        mean_square: mean square of the weights.
        cluster_mean_squared_error: error of the clustering without compensation; None for a method without clusters.
        stats: measurements of the method.
        source_sha256: range of a file of the source ("FILE:START-END") -> sha256 of the bytes that were read there.
        calibration_tokens: tokens of the calibration, if a Hessian weighted the errors.
        moments_sha256: sha256 of the file of the Hessian, if one weighted the errors.
        tuned_sha256: sha256 of the file of tuned values, or "" if tuning was not applied; None for an untuned matrix.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    method: str | None = None
    bits_per_weight: float | None = None
    paper_bits: float | None = None
    relative_error: float | None = None
    mean_squared_error: float | None = None
    mean_square: float | None = None
    cluster_mean_squared_error: float | None = None
    read_seconds: float = 0.0
    seconds: float = 0.0
    stored_bytes: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)
    source_sha256: Mapping[str, str] = field(default_factory=dict)
    calibration_tokens: int | None = None
    moments_sha256: str | None = None
    tuned_sha256: str | None = None

    def to_json(self) -> JsonRow:
        """The row as JSON."""
        values = {**asdict(self), "shape": list(self.shape)}
        return {key: value for key, value in values.items() if value is not None or key not in _OPTIONAL}

    @classmethod
    def from_json(cls, row: JsonRow) -> "CompressedRow":
        """Inverse of `to_json`. Other keys (action, reason, …) are ignored."""
        values = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        return cls(**{**values, "shape": tuple(row["shape"])})


@dataclass(frozen=True)
class MatrixResult:
    """A compressed matrix: its row of the report, and its entry of config.json."""

    row: CompressedRow
    entry: Entry

    def to_json(self) -> JsonRow:
        """The result as JSON, for the record of a finished file."""
        return {**self.row.to_json(), "entry": self.entry.to_json()}

    @classmethod
    def from_json(cls, row: JsonRow) -> "MatrixResult":
        """Inverse of `to_json`."""
        entry = entry_of(row["entry"])
        return cls(CompressedRow.from_json({"shape": entry.shape, **row}), entry)


def compressed_rows(report: JsonRow) -> list[JsonRow]:
    """The rows of compressed matrices in a report, as JSON."""
    return [row for row in report["tensors"] if row["action"] == "compressed"]


def measured_rows(report: JsonRow) -> dict[str, CompressedRow]:
    """Matrix -> its row, from a report in JSON."""
    return rows_by_name(CompressedRow.from_json(row) for row in compressed_rows(report))


def rows_by_name(rows: Iterable[CompressedRow]) -> dict[str, CompressedRow]:
    """Matrix -> its row."""
    return {row.name: row for row in rows}

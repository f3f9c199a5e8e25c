"""Rows of swsc_report.json about compressed matrices, and the results that workers return for them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import entry_of

# keys that a row has only where they apply
_OPTIONAL = ("calibration_tokens", "moments_sha256", "tuned_sha256")


@dataclass(frozen=True)
class CompressedRow:
    """What a report states about one compressed matrix; bits are counted from the bytes that are stored.

    Attributes:
        relative_error: ‖W − Ŵ‖²_F / ‖W‖²_F.
        mean_square: of the weights.
        cluster_mean_squared_error: of the clustering alone; None for a method without one.
        stats: measurements of the method.
        source_sha256: range of a file of the source ("FILE:START-END") -> sha256 of the bytes that were read there.
        calibration_tokens, moments_sha256: of the second moments, where errors were weighed by them.
        tuned_sha256: of the file of tuned values, "" if tuning was not applied; None for a matrix that was not tuned.
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
    stats: Mapping[str, Any] = field(default_factory=dict)
    source_sha256: Mapping[str, str] = field(default_factory=dict)
    calibration_tokens: int | None = None
    moments_sha256: str | None = None
    tuned_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a report holds it."""
        found = {**asdict(self), "shape": list(self.shape)}
        return {key: value for key, value in found.items() if value is not None or key not in _OPTIONAL}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CompressedRow":
        """Inverse of `to_json`; a row of an earlier release may lack figures. Other keys (action, reason, …) are ignored."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        return cls(**{**known, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class MatrixResult:
    """A compressed matrix: its row of the report, and its entry of config.json."""

    row: CompressedRow
    entry: Entry

    def to_json(self) -> dict[str, Any]:
        """As the record of a finished file holds it."""
        return self.row.to_json() | {"entry": self.entry.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MatrixResult":
        """Inverse of `to_json`."""
        entry = entry_of(data["entry"])
        return cls(CompressedRow.from_json({"shape": entry.shape, **data}), entry)


def measured_rows(report: Mapping[str, Any]) -> dict[str, CompressedRow]:
    """Matrix -> its row, of a report that was read."""
    return rows_by_name(CompressedRow.from_json(row) for row in report["tensors"] if row["action"] == "compressed")


def rows_by_name(rows: Iterable[CompressedRow]) -> dict[str, CompressedRow]:
    """Matrix -> row."""
    return {row.name: row for row in rows}

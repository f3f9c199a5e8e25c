"""Types of the small JSON files of an output: what a run may honestly write is never called damaged."""

import math

import pytest

from pipeline.storage.records import FinishedRowRecord, ReportRowRecord, TuningRecord, check_record

ENTRY = {
    "centroid_bits": None,
    "channel_axis": "output",
    "codebooks": 1,
    "dtype": "bfloat16",
    "factor_bits": None,
    "method": "swsc",
    "n_clusters": 8,
    "rank": 2,
    "scaled": False,
    "segment_size": 64,
    "shape": [32, 64],
}
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("figure", NOT_FINITE)
def test_a_result_that_is_no_number_is_a_result(figure: float) -> None:
    """A tuning in float16 that overflowed is not applied; a matrix of 1e21 has an infinite squared norm in float32."""
    tuning = {"steps": 3, "divergence_before": 0.1, "divergence_after": figure, "applied": False, "tokens": 64}
    assert check_record(TuningRecord, tuning) == tuning
    made = {"entry": ENTRY, "stored_bytes": 1, "read_seconds": 0.5, "stats": {"energy": figure}}
    check_record(FinishedRowRecord, {"name": "w", **made})
    check_record(
        ReportRowRecord, {"name": "w", "action": "compressed", "reason": "", "shape": [2, 3], "relative_error": figure}
    )


@pytest.mark.parametrize("value", ["0.1", True, [0.1]])
def test_what_is_no_number_at_all_is_not(value: object) -> None:
    with pytest.raises(ValueError, match="divergence_after"):
        check_record(TuningRecord, {"steps": 3, "divergence_before": 0.1, "divergence_after": value, "applied": False})


@pytest.mark.parametrize("lacking", ["stats", "stored_bytes", "read_seconds", "entry"])
def test_a_row_of_a_matrix_needs_all_fields_of_a_report(lacking: str) -> None:
    row = {"name": "w", "entry": ENTRY, "stored_bytes": 1, "read_seconds": 0.5, "stats": {}}
    assert check_record(FinishedRowRecord, row) == row
    with pytest.raises(ValueError, match="describes neither"):
        check_record(FinishedRowRecord, {key: value for key, value in row.items() if key != lacking})
    with pytest.raises(ValueError, match="describes neither"):
        check_record(FinishedRowRecord, row | {"entry": None})
    check_record(FinishedRowRecord, {"name": "w", "tokens": 3, "owner": "w"})

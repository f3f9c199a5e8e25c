"""Rows of reports and results of workers are written and read as JSON without a loss."""

import json

import torch

from pipeline.outputs.report_rows import CompressedRow, MatrixResult, measured_rows
from swsc_core import SwscSpec, encode

ROW = CompressedRow("w", (4, 6), "float32", "swsc", 3.5, 3.0, stored_bytes=12, stats={"energy": 1.0})


def test_a_result_is_read_as_it_was_written() -> None:
    entry = encode(torch.randn(4, 6), [SwscSpec(2, 1)]).entry
    for row in (ROW, CompressedRow("v", (2, 3), moments_sha256="a", calibration_tokens=0, tuned_sha256="")):
        result = MatrixResult(row, entry)
        assert MatrixResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_keys_of_calibration_and_tuning_are_there_only_where_they_apply() -> None:
    assert not {"calibration_tokens", "moments_sha256", "tuned_sha256"} & ROW.to_json().keys()
    assert ROW.to_json()["cluster_mean_squared_error"] is None


def test_rows_of_a_report_are_those_of_compressed_matrices() -> None:
    report = {"tensors": [{**ROW.to_json(), "action": "compressed", "reason": "q"}, {"name": "b", "action": "copied"}]}
    assert measured_rows(json.loads(json.dumps(report))) == {"w": ROW}

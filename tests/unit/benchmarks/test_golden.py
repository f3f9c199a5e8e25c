"""What `benchmarks.golden` counts as a difference between two recordings."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.golden.digests import differences, digests_of


def output(folder: Path, *, label: int = 0, seconds: float = 1.0, error: float = 0.25) -> dict[str, Any]:
    """Digests of an output with a few labels and a report."""
    folder.mkdir()
    save_file({"labels": torch.tensor([0, 1, 2, label], dtype=torch.uint8)}, folder / "model.safetensors")
    row = {"name": "q", "seconds": seconds, "relative_error": error}
    (folder / "swsc_report.json").write_text(json.dumps({"tensors": [row], "argv": [str(folder)]}))
    (folder / "README.md").write_text(f"took {seconds} s")
    return digests_of(folder)


def test_times_arguments_and_cards_are_no_difference(tmp_path: Path) -> None:
    before, after = output(tmp_path / "before"), output(tmp_path / "after", seconds=2.0)
    assert list(differences(before, after)) == []


def test_a_flipped_label_is_a_difference_of_its_file(tmp_path: Path) -> None:
    before, after = output(tmp_path / "before"), output(tmp_path / "after", label=1)
    (line,) = differences(before, after)
    assert line.startswith("model.safetensors:")


def test_a_value_of_the_report_is_a_difference_of_its_row(tmp_path: Path) -> None:
    before, after = output(tmp_path / "before"), output(tmp_path / "after", error=0.2500001)
    (line,) = differences(before, after)
    assert line.startswith("swsc_report.json · tensors · q · relative_error:")


def test_a_missing_key_a_new_file_and_an_int_for_a_float_are_differences() -> None:
    assert sorted(differences({"report": {"a": 1, "b": 2}}, {"report": {"a": 1.0}, "file": "0"})) == [
        "file: new",
        "report · a: 1 → 1.0",
        "report · b: missing",
    ]

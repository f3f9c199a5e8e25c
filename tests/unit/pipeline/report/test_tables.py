"""Claims about tables for people."""

import pytest

from pipeline.report.tables import print_table


def printed(capsys: pytest.CaptureFixture[str], rows: list[dict[str, object]], *keys: str) -> list[list[str]]:
    """Cells of the table that `print_table` prints, heading first and ruler left out."""
    print_table(rows, keys)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_layers_come_in_the_order_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"name": f"layers.{layer}.q"} for layer in (10, 1, 2)]
    assert printed(capsys, rows, "name") == [["tensor"], ["layers.1.q"], ["layers.2.q"], ["layers.10.q"]]


def test_models_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"model": m, "name": f"layers.{n}.q"} for n in (10, 9) for m in ("b", "a")]
    assert [row[0] for row in printed(capsys, rows, "model", "name")[1:]] == ["a", "a", "b", "b"]


def test_empty_columns_are_left_out_and_figures_are_rounded(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [{"variant": "b", "perplexity": 5.4721, "error": None}, {"variant": "a"}]
    assert printed(capsys, rows, "variant", "perplexity", "error") == [
        ["variant", "perplexity"],
        ["b", "5.472"],
        ["a", ""],
    ]


def test_shapes_read_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, [{"name": "w", "shape": [3, 4]}], "shape")[1] == ["3×4"]


def test_very_many_tensors_are_shown_kind_by_kind_with_their_means(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, object]] = [
        {"name": f"layers.{layer}.{role}", "shape": [3, 4], "bits_per_weight": 2.0 + layer % 2}
        for layer in range(200)
        for role in "qk"
    ]
    assert printed(capsys, rows, "name", "shape", "bits_per_weight") == [
        ["tensors", "tensor", "shape", "true bits"],
        ["200", "layers.N.k", "3×4", "2.500"],
        ["200", "layers.N.q", "3×4", "2.500"],
    ]

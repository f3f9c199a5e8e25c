"""Verbs on texts in tables have the same figures, bytes and errors as on the plain text."""

import gzip
import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.support.tiny import contents, make_text

SHORT = ["--calibration-windows", "6", "--calibration-seqlen", "32", "--local"]
MEASURED = ["--seqlen", "32", "--windows", "4", "--local"]


@pytest.fixture
def passages(tmp_path: Path) -> list[str]:
    """Documents that the tiny tokenizer knows."""
    words = make_text(tmp_path / "words.txt", 1500, seed=5).read_text().split()
    return [" ".join(words[start : start + 50]) for start in range(0, len(words), 50)]


@pytest.fixture
def lines(passages: list[str], tmp_path: Path) -> Path:
    """Them as JSON lines, compressed, in a column of another name beside one more of strings."""
    path = tmp_path / "lines.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps({"title": "t", "body": one}) for one in passages).encode()))
    return path


@pytest.fixture
def plain(passages: list[str], tmp_path: Path) -> Path:
    """The documents, separated by blank lines."""
    path = tmp_path / "plain.txt"
    path.write_text("\n\n".join(passages))
    return path


def test_a_perplexity_is_that_of_the_plain_text_and_names_column_and_documents(
    tiny_model: Path, lines: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for text, flags in ((lines, ["--text-column", "body"]), (plain, [])):
        out = tmp_path / f"{text.name}.json"
        assert main(["evaluate", str(tiny_model), "--text", str(text), *flags, *MEASURED, "--json", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    assert "column 'body' of 30 documents" in capsys.readouterr().out
    assert (results[0]["text_documents"], results[0]["text_column"]) == (30, "body")
    for key in ("perplexity", "text_sha256", "text_tokens", "windows"):
        assert results[0][key] == results[1][key]
    assert "text_documents" not in results[1]


def test_bytes_calibrated_on_a_table_are_those_of_the_plain_text_and_it_is_not_measured_on_again(
    tiny_model: Path, lines: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text, flags in (("one", lines, ["--text-column", "body"]), ("two", plain, [])):
        argv = ["compress", str(tiny_model), str(tmp_path / name), "--preset", "fast", "--bits", "3", *SHORT, *flags]
        assert main([*argv, "--calibration", str(text), "--cache-dir", str(tmp_path / f"cache-{name}")]) == 0
    printed = capsys.readouterr().err
    assert printed.count("column 'body' of 30 documents") == 1
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in one if one[name] != two[name]} <= {
        "README.md",
        "swsc_calibration.json",
        "swsc_manifest.json",
    }
    for text, flags in ((plain, []), (lines, ["--text-column", "body"])):
        assert main(["evaluate", str(tmp_path / "one"), "--text", str(text), *flags, *MEASURED]) == 2
        assert "shares passages" in capsys.readouterr().err


def test_one_flag_serves_both_texts_and_a_plain_one_needs_none(
    tiny_model: Path, lines: Path, text: Path, tmp_path: Path
) -> None:
    argv = [
        "compress",
        str(tiny_model),
        str(tmp_path / "out"),
        "--preset",
        "fast",
        "--bits",
        "3",
        *SHORT,
        "--text",
        str(text),
    ]
    argv += ["--calibration", str(lines), "--text-column", "body", "--seqlen", "32", "--windows", "2"]
    assert main(argv) == 0


@pytest.mark.parametrize("flag", ["--text", "--calibration"])
def test_a_column_that_is_not_clear_is_refused_with_all_columns(
    tiny_model: Path, lines: Path, tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(tiny_model), str(tmp_path / "out"), flag, str(lines), "--local"]
    assert main([*argv, *(["--preset", "fast", "--bits", "3"] if flag == "--calibration" else [])]) == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in ("lines.jsonl.gz", "title, body", "--text-column"))
    assert not (tmp_path / "out").exists()


def test_a_plain_text_has_no_columns(tiny_model: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_model), "--text", str(plain), "--text-column", "body", *MEASURED]) == 2
    assert "--text-column" in capsys.readouterr().err


def test_a_sweep_reads_them_as_well(tiny_model: Path, lines: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"models: [{tiny_model}]\ncalibration: {text}\ncalibration_windows: 4\ncalibration_seqlen: 32\n"
        "variants: [{name: fast, preset: fast, bits: 3}]\n"
        f"evaluations: [{{text: {lines}, text_column: body, seqlen: 32, windows: 2}}]\n"
    )
    assert main(["sweep", str(config), "--out", str(tmp_path / "results"), "--local"]) == 0
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert [row["text_documents"] for row in rows] == [30, 30]


@pytest.mark.parametrize("dtype", ["auto", "float33"])
def test_a_config_that_transformers_cannot_read_is_named(
    tiny_model: Path, plain: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    assert main(["evaluate", str(model), "--text", str(plain), *MEASURED]) == 2
    printed = capsys.readouterr().err
    assert all(part in printed for part in ("config.json", f"'{dtype}'", "set the dtype of the weights"))

"""An address that gives access to a text does not stand in what may be published."""

import sys
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.texts.texts import Text
from tests.support.tiny import make_text

ADDRESS = "https://me:secret@host/text.txt?signature=secret"


def test_signed_addresses_and_passwords_stand_in_no_file(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = iter([make_text(tmp_path / "other.txt", 3000, seed=5).read_text(), text.read_text()])
    monkeypatch.setattr("pipeline.texts.windows.open_text", lambda *_, **__: Text(next(contents)))
    monkeypatch.setattr("pipeline.evaluation.flow.read_text", lambda *_: text.read_text())
    output, result = tmp_path / "out", tmp_path / "result.json"
    windows = ("--calibration-windows", "4", "--calibration-seqlen", "32")
    argv = ["compress", str(tiny_model), str(output), "--preset", "fast", "--bits", "3", "--calibration", ADDRESS]
    monkeypatch.setattr(sys, "argv", argv)
    assert main([*argv, *windows, "--local"]) == 0
    measure = ("--seqlen", "32", "--windows", "2", "--local", "--card", "--json", str(result))
    assert main(["evaluate", str(output), "--text", ADDRESS, *measure]) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if b"secret" in path.read_bytes()] == []
    assert "text.txt" in (output / "README.md").read_text()

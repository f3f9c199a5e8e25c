"""Results are kept and exit codes are right even if output cannot be printed."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.command_line.streams import safe_streams
from tests.support.project import ROOT


class Failing(io.RawIOBase):
    """A device that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raise OSError(self.number, "no")


def stream(number: int, **how: object) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(Failing(number), 16), encoding="utf-8", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_letters_that_an_encoding_lacks_are_printed_as_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with safe_streams() as lost:
        print("3×4… \U0001f600 end")
        assert lost() is None
    assert raw.getvalue().decode(encoding).endswith(" end\n")


@pytest.mark.parametrize(("number", "reported"), [(errno.EPIPE, False), (errno.ENOSPC, True), (errno.EIO, True)])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_stream_that_fails_goes_silent(
    number: int, reported: bool, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stream(number, write_through=not buffered))
    with safe_streams() as lost:
        for _ in range(3):
            print("x" * (1 if buffered else 100))
        assert (lost() is not None) is reported


def test_streams_that_are_closed_are_none_for_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with safe_streams() as lost:
        print("nobody reads this")
        assert not sys.stdout.isatty()
        assert lost() is None


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (io.TextIOWrapper(io.BytesIO(), encoding="ascii"), 0),
        (stream(errno.EPIPE), 0),
        (stream(errno.ENOSPC), 1),
        (None, 0),
    ],
    ids=["ascii", "reader gone", "disk full", "closed"],
)
@pytest.mark.parametrize("verb", ["evaluate", "plan", "sweep", "compress"])
def test_a_result_is_kept(
    verb: str, output: io.TextIOWrapper | None, code: int, tiny_model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = tmp_path / "sweep.yaml"
    config.write_text(f"models: [{tiny_model}]\nvariants: [{{name: rtn ×, method: rtn, bits: 4}}]\n")
    argv, kept = {
        "evaluate": (
            ["--text", str(text), "--seqlen", "64", "--windows", "2", "--json", str(tmp_path / "r.json")],
            "r.json",
        ),
        "plan": (["--json", str(tmp_path / "r.json")], "r.json"),
        "sweep": (["--out", str(tmp_path / "out")], "out/results.json"),
        "compress": ([str(tmp_path / "out"), "--clusters", "4", "--rank", "1"], "out/swsc_report.json"),
    }[verb]
    monkeypatch.setattr(sys, "stdout", output)
    assert main([verb, str(config if verb == "sweep" else tiny_model), *argv, "--local"]) == code
    assert sys.stdout is output
    assert json.loads((tmp_path / kept).read_text())
    assert ("standard output" in capsys.readouterr().err) is (code == 1)


@pytest.mark.parametrize("redirection", [">&-", "2>&- >&-", "| head -c 1 >/dev/null", "2>&1 | true"])
def test_a_shell_sees_the_exit_code_and_no_traceback(redirection: str, tmp_path: Path) -> None:
    command = f"(set -o pipefail; '{sys.executable}' -m jobs --help {redirection}); echo $?"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1] == "0"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr

"""Ctrl-C and SIGTERM at every operation of a run.

Exit code 130, no finished file is lost, no partial file counts as complete.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.engine import signals
from pipeline.storage import lease, store
from pipeline.storage.local_files import LocalFiles
from tests.support.faults import FaultyFiles
from tests.support.project import ROOT
from tests.support.tiny import contents, make_tiny_model

FLAGS = ["--local", "--projectors", "q,k", "--clusters", "4", "--rank", "1", "--n-init", "1"]


class Dropping:
    """Python drops what is raised in a finalizer."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


class InterruptedFiles(FaultyFiles):
    """A signal comes before operation number `at`: "raised" where Python raises it, "dropped" where it does not."""

    def _struck(self, operation: str) -> str:
        self.count += 1
        if self.count == self._at and self._mode == "raised":
            signal.raise_signal(signal.SIGTERM)
        elif self.count == self._at:
            Dropping()
        return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("one") / "model", layers=1)


def compress(model: Path, output: Path) -> int:
    return main(["compress", str(model), str(output), *FLAGS])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("mode", ["raised", "dropped"])
def test_a_signal_at_any_operation_ends_the_run_and_the_same_command_completes_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(lease, "_RENEWAL_SECONDS", 60.0)  # no operations of another thread among those that are counted
    assert compress(model, tmp_path / "straight") == 0
    expected, number, codes = contents(tmp_path / "straight"), 1, set()
    while True:
        files = InterruptedFiles(LocalFiles(), mode, number)
        monkeypatch.setattr(store, "files_at", lambda scheme, files=files: files)
        place = tmp_path / str(number)
        code = compress(model, place)
        monkeypatch.setattr(store, "files_at", lambda scheme: LocalFiles())
        if files.count < number:
            break
        codes.add(code)
        assert compress(model, place) == 0
        assert contents(place) == expected
        number += 5
    assert codes == {signals.EXIT_CODE}
    assert number > 30


def test_handlers_are_as_before_when_a_run_in_another_program_ends(model: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert compress(model, tmp_path / "out") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_held_is_whole_before_a_signal_arrives() -> None:
    steps = []

    def work() -> None:
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
            with signals.deferred():
                steps.append("inner")
            steps.append("outer")

    with signals.handle_signals():
        with pytest.raises(KeyboardInterrupt):
            work()
        with pytest.raises(KeyboardInterrupt):
            signals.raise_if_interrupted()
    assert steps == ["inner", "outer"]


def test_two_signals_at_once_are_one() -> None:
    """`timeout` sends to the process and to its group."""
    with signals.handle_signals():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # while the first one is being cleaned up after


@pytest.mark.parametrize("instead", [SystemError, BaseException, SystemExit])
def test_what_a_library_raises_in_place_of_an_interrupt_is_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], instead: type
) -> None:
    """pydantic's and PyO3's code in Rust does, in imports and validators."""

    def parse(argv: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise instead("failed to import") from None

    monkeypatch.setattr("jobs.cli._parse", parse)
    assert compress(model, tmp_path / "out") == signals.EXIT_CODE
    assert "run the same command again" in capsys.readouterr().err


def test_an_interrupt_that_python_drops_is_recorded_and_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))

    class Interrupted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # the handler runs between two instructions of Python

    class Faulty:
        def __del__(self) -> None:
            raise ValueError("a fault")

    with signals.handle_signals():
        Faulty()
        Interrupted()
        assert signals.is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signals.raise_if_interrupted()
    assert reported == [ValueError]


@contextmanager
def process(*argv: object, code: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A command that listens to signals already."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "jobs", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as running:
        try:
            while not _listens(running.pid):
                assert running.poll() is None, running.communicate()
                time.sleep(0.005)
            yield running
        finally:
            running.kill()


def _listens(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for handlers in /proc")


@needs_proc
@pytest.mark.parametrize(
    ("delay", "number"),
    [(0.0, signal.SIGTERM), (0.1, signal.SIGINT), (0.3, signal.SIGTERM), (0.7, signal.SIGINT), (1.5, signal.SIGTERM)],
)
def test_a_command_that_is_still_being_imported_or_planned_ends(
    model: Path, tmp_path: Path, delay: float, number: int
) -> None:
    # work for longer than any delay
    flags = ["--local", "--bits", "4", "--n-init", "1000", "--projectors", "q,k,v,o,gate,up,down"]
    with process("compress", model, tmp_path / "out", *flags) as running:
        time.sleep(delay)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == signals.EXIT_CODE, out + err
    assert "Traceback" not in err
    assert "run the same command again" in err


@needs_proc
def test_a_second_signal_ends_a_process_that_calculates_without_looking_at_signals() -> None:
    code = (
        "import time, torch, sys\n"
        "from pipeline.engine import signals\n"
        "torch.set_num_threads(1)\n"
        "weight = torch.randn(3000, 3000, dtype=torch.float64)\n"
        "with signals.handle_signals():\n"
        "    print('now', flush=True)\n"
        "    torch.linalg.svd(weight)\n"
    )
    with process(code=code) as running:
        assert running.stdout
        running.stdout.readline()
        running.send_signal(signal.SIGINT)
        time.sleep(signals._SAME_SIGNAL_SECONDS + 0.1)
        assert running.poll() is None, "the first one waits for the calculation"
        running.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert running.wait(20) == signals.EXIT_CODE
        assert time.monotonic() - started < 5


def test_one_signal_is_one_although_the_thread_that_hears_it_runs_after_everything_is_over() -> None:
    code = (
        "import signal, sys, time\n"
        "from pipeline.engine import signals\n"
        "sys.setswitchinterval(5)\n"
        "with signals.handle_signals(until_exit=True):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n"
        "        signals.clear()\n"
        "time.sleep(0.2)\n"
        "print('orderly')\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "orderly\n", done.stderr
    assert done.returncode == signals.EXIT_CODE  # of the second one


@pytest.mark.parametrize("busy", ["time.sleep(2)", "sum(range(10**8))"], ids=["idle", "calculates"])
def test_an_alarm_that_a_library_sets_for_a_signal_is_cancelled(busy: str) -> None:
    program = f"""
import os, signal, time
from pipeline.engine import signals

with signals.handle_signals():
    try:
        with signals.deferred():
            signal.alarm(1)
            os.kill(os.getpid(), signal.SIGTERM)
            {busy}
    except KeyboardInterrupt:
        print("arrived")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "arrived\n"), done.stderr

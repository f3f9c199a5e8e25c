"""A disk that takes nothing more ends a run at once, whoever writes to it; what is finished is kept."""

import errno
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.task import Task, as_swsc_error
from pipeline.errors import DiskFull, RunError
from pipeline.storage import store
from pipeline.storage.files import BytesLike
from pipeline.storage.local_files import LocalFiles
from tests.support.tiny import contents, make_text

COMPRESS = ["--local", "--projectors", "q,k", "--clusters", "4", "--rank", "1", "--n-init", "1"]
TUNE = ["--local", "--preset", "best", "--bits", "3", "--tune", "1", "--calibration-windows", "12"]
TUNE += ["--calibration-seqlen", "32", "--projectors", "q"]


class Filling(LocalFiles):
    """A disk on which nothing can be written any more after the first file whose path matches the pattern `after`."""

    def __init__(self, after: str, number: int) -> None:
        self._after, self._number, self.full, self.refused = after, number, False, 0

    def write(self, path: str, pieces: Iterable[BytesLike]) -> None:
        if self.full:
            self.refused += 1
            pieces = self._half(pieces)
        super().write(path, pieces)
        self.full = self.full or fnmatch(path, self._after)

    def _half(self, pieces: Iterable[BytesLike]) -> Iterator[bytes]:
        yield b"".join(bytes(piece) for piece in pieces)[:1]
        raise OSError(self._number, os.strerror(self._number))


@pytest.fixture
def compressions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks that a worker was given."""
    real, found = LocalPool.start, []

    def start(self: LocalPool, worker: int, task: Task[Any]) -> None:
        found.append(task.kind)
        real(self, worker, task)

    monkeypatch.setattr(LocalPool, "start", start)
    return found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_the_first_file_that_finds_no_room_is_the_last(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    compressions: list[str], number: int,
) -> None:  # fmt: skip
    disk = Filling("*/.swsc/done/*", number)
    monkeypatch.setattr(store, "files_at", lambda scheme: disk)
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *COMPRESS]) == 1
    assert len(compressions) == 2, "one that is finished, one that found no room"
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main(["compress", str(tiny_model), str(tmp_path / "out"), *COMPRESS]) == 0
    assert "1 files were finished" in capsys.readouterr().out
    assert main(["compress", str(tiny_model), str(tmp_path / "straight"), *COMPRESS]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("after", "last"),
    [
        ("*/moments-*/source.json", "KeepHessians"),  # the calibration's first file
        ("*/untuned-*/.swsc/run.json", "CompressLayer"),  # the model that is to be tuned
        ("*/tuned-*/.swsc/run.json", "KeepState"),  # the tuning's state
        ("*/out/config.json", ""),  # what the driver itself writes at the end
    ],
)
def test_so_does_a_cache_and_what_the_driver_writes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressions: list[str], after: str, last: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = make_text(tmp_path / "text.txt", 3000)
    command = ["compress", str(tiny_model), str(tmp_path / "out"), *TUNE, "--calibration", str(text)]
    disk = Filling(after, errno.EDQUOT)
    monkeypatch.setattr(store, "files_at", lambda scheme: disk)
    assert main(command) == 1
    assert "run the same command again" in capsys.readouterr().err.splitlines()[-1]
    assert not last or compressions[-1] == last
    monkeypatch.setattr(store, "files_at", lambda scheme: LocalFiles())
    assert main(command) == 0


def test_other_troubles_of_a_disk_are_not_taken_for_a_full_one() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        assert isinstance(as_swsc_error(OSError(number, os.strerror(number), "/disk/file"), "a layer"), DiskFull)
    for number in (errno.EIO, errno.ENOENT, errno.EACCES):
        found = as_swsc_error(OSError(number, os.strerror(number), "/disk/file"), "a layer")
        assert type(found) is RunError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_disk_that_fills_up(
    tiny_model: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch,
    compressions: list[str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = LocalFiles.write

    def write(self: LocalFiles, path: str, pieces: Iterable[BytesLike]) -> None:
        real(self, path, pieces)
        if ".swsc/done/" in path and not (small_disk / "fill").exists():
            with suppress(OSError), (small_disk / "fill").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    monkeypatch.setattr(LocalFiles, "write", write)
    assert main(["compress", str(tiny_model), str(small_disk / "out"), *COMPRESS]) == 1
    assert len(compressions) <= 3
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    (small_disk / "fill").unlink()
    assert main(["compress", str(tiny_model), str(small_disk / "out"), *COMPRESS]) == 0

"""Tuned rows of a sweep: their files, the disk space that they need, and their messages."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.task import Task
from pipeline.storage.files import BytesLike
from pipeline.storage.local_files import LocalFiles
from pipeline.tuning.flow import Tuning
from pipeline.tuning.tuner import TunedValues
from tests.support.tiny import make_text, make_tiny_model

TUNED = {"preset": "best", "bits": 3, "projectors": "q"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("one") / "model", layers=1)


@pytest.fixture
def command(model: Path, text: Path, tmp_path: Path) -> list[str]:
    """A sweep of two rows that are tuned from the same compressed model, and one that is not tuned."""
    settings = {
        "models": [str(model)],
        "calibration": str(make_text(tmp_path / "calibration.txt", 3000, seed=5)),
        "calibration_windows": 9,
        "calibration_seqlen": 32,
        "cache_dir": str(tmp_path / "cache"),
        "evaluations": [{"text": str(text), "seqlen": 64, "windows": 2}],
        "variants": [
            {"name": "once", **TUNED, "tune": 1},
            {"name": "twice", **TUNED, "tune": 2},
            {"name": "plain", **TUNED, "tune": 0},
        ],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings))
    return ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]


def cached(tmp_path: Path) -> list[str]:
    """Kinds of the entries in the cache."""
    return sorted(place.name.partition("-")[0] for place in (tmp_path / "cache").iterdir())


def rows(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}


def test_models_of_tuned_rows_go_when_they_are_measured_and_stay_on_request(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    assert main([*command, "--keep-tuned"]) == 0
    assert cached(tmp_path) == ["moments", "variant", "variant"]
    kept, printed = rows(tmp_path), capsys.readouterr()
    assert {row["tuning"] for name, row in kept.items() if name in ("once", "twice")} <= {"applied", "not applied"}
    assert kept["plain"]["tuning"] is None
    for name in ("once", "twice"):
        assert f"{model}, {name}: tune: " in printed.err
        assert f"{model}, {name}: compress: " in printed.err
    assert f"{model}, once: calibrate: " in printed.err
    assert main(command) == 0
    assert cached(tmp_path) == ["moments"]
    assert {name: row["perplexity"] for name, row in rows(tmp_path).items()} == {
        name: row["perplexity"] for name, row in kept.items()
    }


def test_an_interrupted_sweep_goes_on_from_its_tuned_models(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    real = LocalPool.start

    def record(self: LocalPool, worker: int, task: Task[Any]) -> None:
        kinds.append(task.kind)
        real(self, worker, task)

    def start(self: LocalPool, worker: int, task: Task[Any]) -> None:
        if task.kind == "MeasureLosses":
            raise KeyboardInterrupt
        real(self, worker, task)

    monkeypatch.setattr(LocalPool, "start", start)
    assert main(command) == 130
    assert cached(tmp_path) == ["moments", "variant", "variant"]
    monkeypatch.setattr(LocalPool, "start", record)
    assert main(command) == 0
    assert "TuneStep" not in kinds
    assert cached(tmp_path) == ["moments"]


def another(tmp_path: Path, command: list[str], *names: str) -> list[str]:
    """The same sweep into another directory, of some of its rows."""
    settings = yaml.safe_load(Path(command[1]).read_text())
    settings["variants"] = [one for one in settings["variants"] if one["name"] in names]
    (tmp_path / "another.yaml").write_text(yaml.safe_dump(settings))
    return ["sweep", str(tmp_path / "another.yaml"), "--out", str(tmp_path / "another-out"), "--local"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("MeasureLosses", ("once", "twice")), ("TuneStep", ("twice",))],
    ids=["the same rows are being measured", "another row is tuned from the same model"],
)
def test_two_sweeps_of_one_cache_leave_each_other_what_they_use(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, names: tuple[str, ...]
) -> None:
    """The second begins and ends while the first is about to do something with what both made."""
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())["rows"]
    begun: list[Task[Any]] = []
    real = LocalPool.start

    def start(self: LocalPool, worker: int, task: Task[Any]) -> None:
        if task.kind == kind and not begun:
            begun.append(task)
            assert main(another(tmp_path, command, *names)) == 0
        real(self, worker, task)

    monkeypatch.setattr(LocalPool, "start", start)
    assert main(command) == 0
    assert begun
    assert [row["perplexity"] for row in rows(tmp_path).values()] == [row["perplexity"] for row in alone]
    assert cached(tmp_path) == ["moments"]


def test_a_tuning_that_was_not_applied_is_shown(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Tuning.run

    def run(self: Tuning, make_pool: Any) -> tuple[TunedValues, dict[str, Any]]:
        tuned, about = real(self, make_pool)
        return TunedValues(tuned.compressed, tuned.store, None), {**about, "applied": False}

    monkeypatch.setattr(Tuning, "run", run)
    assert main(command) == 0
    assert rows(tmp_path)["once"]["tuning"] == "not applied"
    assert "not applied" in capsys.readouterr().out


def test_room_is_asked_for_all_tuned_rows_together_before_any_work(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    one = sum(file.stat().st_size for file in model.glob("*.safetensors"))  # a compressed one is not much smaller
    monkeypatch.setattr(LocalFiles, "free_bytes", lambda self, path: int(1.5 * one))
    started: list[Task[Any]] = []
    monkeypatch.setattr(LocalPool, "start", lambda self, worker, task: started.append(task))
    assert main(command) == 2
    assert "bytes are needed" in capsys.readouterr().err
    assert not started


def test_what_a_sweep_that_was_killed_had_half_written_is_tidied_by_the_next(
    command: list[str], tmp_path: Path
) -> None:
    """Before its mark was there, and while it wrote its results; a file of somebody else is left alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".swsc-sweep.0123abcd.partial").write_bytes(b"")
    assert main(command) == 0
    half = [tmp_path / "out" / f"{name}.0123abcd.partial" for name in ("results.json", "tensors.parquet", "mine")]
    for file in half:
        file.write_bytes(b"{")
    assert main(command) == 0
    assert [file.name for file in (tmp_path / "out").glob("*.partial")] == [half[-1].name]
    assert not (tmp_path / "out" / ".swsc-sweep.0123abcd.partial").exists()


def test_results_that_no_disk_takes_are_printed_at_least(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = LocalFiles.write

    def write(self: LocalFiles, path: str, pieces: Iterable[BytesLike]) -> None:
        if path.endswith("results.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        real(self, path, pieces)

    monkeypatch.setattr(LocalFiles, "write", write)
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "perplexity" in printed.out
    assert "twice" in printed.out
    assert "run the same command again" in printed.err


@pytest.mark.parametrize("kind", ["variant", "untuned", "tuned", "moments"])
def test_the_error_of_a_damaged_cache_entry_names_what_to_remove_and_that_helps(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("pipeline.sweep.sweep.remove_intermediates", lambda *_, **__: None)
    assert main([*command, "--keep-tuned"]) == 0
    for place in (tmp_path / "cache").iterdir():
        if place.name.startswith(kind):
            damage(place)
        elif place.name.startswith("variant"):
            shutil.rmtree(place)
    capsys.readouterr()
    codes: list[int] = []
    for _ in range(3):  # places that may be damaged, and once more
        codes.append(main(command))
        if codes[-1] == 0:
            break
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        (place,) = [found for found in (tmp_path / "cache").iterdir() if f"remove {found}, and run" in printed]
        assert "--overwrite" not in printed
        shutil.rmtree(place)
    assert codes in ([2, 0], [2, 2, 0])


def damage(place: Path) -> None:
    """Truncate a file of an output, and remove from another the key that names its owner."""
    if (place / "config.json").exists():
        (place / "config.json").write_text("{")
    elif (place / "result.json").exists():
        (place / "result.json").unlink()
        (place / "thesis.tex").write_text("years of work")
        shutil.rmtree(place / ".swsc", ignore_errors=True)
    else:
        (place / ".swsc" / "run.json").unlink()

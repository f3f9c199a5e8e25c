"""Sweeps: many models, variants and texts in one run, equal to the single runs."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from pipeline.compression import job as compression
from pipeline.compression.job import CompressVariants
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.memory import Room
from pipeline.engine.stage import Stage
from pipeline.engine.task import JobContext, Pool, Task
from pipeline.engine.worker import Worker
from pipeline.evaluation.job import MeasureLosses
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.storage.lease import acquire_lease
from pipeline.storage.store import Store
from pipeline.sweep.rows import known_model
from pipeline.sweep.sweep import Sweep
from tests.support.tiny import WORDS, make_tiny_model

VARIANTS: list[dict[str, Any]] = [
    {"name": "q", "projectors": "q", "bits": 4},
    {"name": "k", "projectors": "k", "bits": 4},
    {"name": "qk", "projectors": "q,k", "bits": 4},
    {"name": "rtn", "method": "rtn", "bits": 3, "projectors": "q,k"},
]


class RecordingPool(LocalPool):
    """A plain loop that remembers what it was given, and the pool of each stage."""

    in_process = True

    def __init__(self) -> None:
        super().__init__(Worker(1, "cpu"))
        self.given: list[Task[Any]] = []

    def start(self, worker: int, task: Task[Any]) -> None:
        self.given.append(task)
        super().start(worker, task)

    def __call__(self, tasks: int, stage: Stage) -> Pool:
        return self

    def require_workers(self, stage: Stage) -> None: ...

    def room(self) -> Room:
        return Room("cpu", 1 << 40)

    def release(self) -> None: ...


def sweep_of(models: list[Path], text: Path, variants: list[dict[str, Any]] = VARIANTS) -> dict[str, Any]:
    evaluations = [{"text": str(text), "seqlen": 64, "windows": 4}, {"text": str(text), "seqlen": 32, "windows": 3}]
    return {"models": [str(model) for model in models], "variants": variants, "evaluations": evaluations}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / name, seed=seed, layers=2) for seed, name in enumerate(("one", "other"))]


def test_a_sweep_equals_its_single_runs_and_writes_json_and_parquet(
    models: list[Path], text: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models, text)))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 2 * 5 * 2
    for row in rows:
        model, single = Path(row["model"]), tmp_path / "single" / Path(row["model"]).name / row["variant"]
        if row["variant"] == "uncompressed":
            single = model
        elif not single.exists():
            variant = next(v for v in VARIANTS if v["name"] == row["variant"])
            flags = [part for key, value in variant.items() if key != "name" for part in (f"--{key}", str(value))]
            assert main(["compress", str(model), str(single), "--local", *flags]) == 0
        flags = ["--seqlen", str(row["seqlen"]), "--windows", str(row["windows"]), "--json", str(tmp_path / "e.json")]
        assert main(["evaluate", str(single), "--text", str(text), "--local", *flags]) == 0
        assert json.loads((tmp_path / "e.json").read_text())["perplexity"] == row["perplexity"]
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert [row["perplexity"] for row in table] == [row["perplexity"] for row in rows]
    tensors = pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist()
    assert len(tensors) == 2 * (2 + 2 + 4 + 4)
    assert all(0 < row["relative_error"] < 1 for row in tensors)


def test_a_tensor_is_read_once_and_a_unit_is_compressed_once(models: list[Path], text: Path) -> None:
    pool = RecordingPool()
    Sweep(validated(SweepSettings, sweep_of(models[:1], text))).run(pool)
    compressions = [task for task in pool.given if isinstance(task.job, CompressVariants)]
    assert len(compressions) == 4  # q and k of two layers, each once
    assert all(task.outputs == 2 for task in compressions)  # 4 bits, shared by two variants, and RTN


def test_evaluation_begins_while_others_still_compress(models: list[Path], text: Path) -> None:
    pool = RecordingPool()
    Sweep(validated(SweepSettings, sweep_of(models, text))).run(pool)
    jobs = [task.job for task in pool.given]
    first_variant = next(i for i, job in enumerate(jobs) if isinstance(job, MeasureLosses) and job.variant)
    last_compression = max(i for i, job in enumerate(jobs) if isinstance(job, CompressVariants))
    assert first_variant < last_compression


def test_one_failing_variant_does_not_stop_the_rest(
    models: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = compression.encode

    def failing(weight: Any, specs: Any, **keywords: Any) -> Any:
        if specs[0].method == "rtn":
            raise RuntimeError("no such luck")
        return real(weight, specs, **keywords)

    monkeypatch.setattr(compression, "encode", failing)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text)))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 10 rows failed" in error
    assert "no such luck" in error
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["variant"] for row in rows if row["perplexity"] is None] == ["rtn", "rtn"]


def test_an_interrupted_sweep_writes_what_it_has_measured(
    models: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = MeasureLosses.run, []

    def measure(self: MeasureLosses, context: JobContext) -> Any:
        calls.append(self)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(self, context)

    monkeypatch.setattr(MeasureLosses, "run", measure)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text)))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 130
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    measured = [row["variant"] for row in rows if row["perplexity"] is not None]
    assert measured[:2] == ["uncompressed", "uncompressed"]
    assert 0 < len(measured) < len(rows)
    assert all(row["error"] == "not finished" for row in rows if row["perplexity"] is None)


def test_an_interrupted_sweep_does_not_take_the_place_of_a_whole_one(
    models: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    command = ["sweep", str(tmp_path / "s.yaml"), "--out", str(out), "--local"]
    assert main(command) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = MeasureLosses.run, []

    def measure(self: MeasureLosses, context: JobContext) -> Any:
        calls.append(self)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, context)

    with monkeypatch.context() as there:
        there.setattr(MeasureLosses, "run", measure)
        assert main(command) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
    rows = json.loads((out / "interrupted" / "results.json").read_text())["rows"]
    assert 0 < sum(not row["error"] for row in rows) < len(rows)
    assert main(command) == 0


def test_each_evaluation_reports_its_own_dtype(models: list[Path], text: Path) -> None:
    settings = sweep_of(models[:1], text, VARIANTS[:1])
    settings["evaluations"][1]["dtype"] = "bfloat16"
    sweep = Sweep(validated(SweepSettings, settings))
    sweep.run(RecordingPool())
    assert [row["dtype"] for row in sweep.result().rows] == ["float32", "bfloat16"] * 2


def test_a_directory_that_is_not_ours_is_left_alone(models: list[Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text)))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


def test_published_figures_stand_beside_ours_only_where_the_model_is_that_one() -> None:
    llama = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008,
        "vocab_size": 32000,
    }  # fmt: skip
    assert known_model(llama) == "Llama-2-7B"
    assert known_model(llama | {"num_hidden_layers": 40}) is None


@pytest.mark.parametrize("file", ["settings.json", "sub/thesis.tex"])
def test_a_directory_that_only_looks_like_ours_is_left_alone(models: list[Path], tmp_path: Path, file: str) -> None:
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_text("mine")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"models": [str(models[0])], "variants": VARIANTS[:1]}))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / file]


def test_earlier_results_stay_when_the_cluster_is_not_there(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    sweep = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]
    assert main([*sweep, "--local"]) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main([*sweep, "--address", "127.0.0.1:1"]) == 2
    assert "error: no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_results_of_other_settings_are_replaced_by_overwrite_only(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]
    results = tmp_path / "out" / "results.json"
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    assert main(sweep) == 0
    before = results.read_bytes()
    assert main([*sweep, "--windows", "2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "evaluations" in line
    assert "--overwrite" in line
    assert results.read_bytes() == before
    assert main([*sweep, "--keep-tuned"]) == 0  # changes no result
    assert main([*sweep, "--windows", "2", "--overwrite"]) == 0
    assert {row["windows"] for row in json.loads(results.read_text())["rows"]} == {2}


def test_a_sweep_without_a_cluster_writes_nothing(models: list[Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    sweep = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]
    assert main([*sweep, "--address", "127.0.0.1:1", "--gpus-per-worker", "0"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_earlier_results_stay_when_nothing_was_measured(
    models: list[Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    sweep = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]
    assert main(sweep) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalPool, "start", stopped)
    assert main(sweep) == 130
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_calibrated_variant_is_the_model_that_compress_would_write(
    tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    draw = random.Random(79)
    (tmp_path / "calibration.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(1500)), encoding="utf-8")
    windows = {"calibration_windows": 6, "calibration_seqlen": 32}
    settings = {
        "models": [str(tiny_model)],
        "calibration": str(tmp_path / "calibration.txt"),
        **windows,
        "evaluations": [{"text": str(text), "seqlen": 64, "windows": 5}],
        "variants": [
            {"name": "ours", "preset": "best", "bits": 3, "projectors": "q,k"},
            {"name": "paper", "bits": 3, "projectors": "q,k"},
        ],
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "swept"), "--local"]) == 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "swept" / "results.json").read_text())["rows"]}
    flags = ["--preset", "best", "--bits", "3", "--calibration", settings["calibration"]]
    cut = [str(part) for key, value in windows.items() for part in (f"--{key.replace('_', '-')}", value)]
    argv = ["compress", str(tiny_model), str(tmp_path / "single"), "--local", *map(str, flags), *cut]
    assert main(argv) == 0
    measured = ["--text", str(text), "--seqlen", "64", "--windows", "5", "--json", str(tmp_path / "e.json")]
    assert main(["evaluate", str(tmp_path / "single"), *measured, "--local"]) == 0
    assert rows["ours"]["perplexity"] == json.loads((tmp_path / "e.json").read_text())["perplexity"]
    assert rows["ours"]["bits_per_weight"] <= 3


def test_flags_stand_in_place_of_the_files_evaluations(models: list[Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    given = ["--windows", "2", "--seqlen", "32", "--dtype", "bfloat16"]
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local", *given]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(row["windows"], row["seqlen"], row["dtype"]) for row in rows} == {(2, 32, "bfloat16")}


def test_a_second_sweep_into_one_directory_is_refused(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of(models[:1], text, VARIANTS[:1])))
    argv = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]
    (tmp_path / "out").mkdir()
    with acquire_lease(Store.at(str(tmp_path / "out"))):
        (tmp_path / "out" / ".swsc-sweep").touch()
        assert main(argv) == 2
    assert "is writing there; wait for it, or stop it" in capsys.readouterr().err
    assert main(argv) == 0
    assert not (tmp_path / "out" / ".swsc").exists()


def test_a_model_is_not_measured_on_what_it_was_calibrated_on(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = ("--calibration-windows", "4", "--calibration-seqlen", "64", "--local")
    dense = tmp_path / "dense"
    compress = ["compress", str(models[0]), str(dense), "--preset", "fast", "--bits", "3", "--calibration", str(text)]
    assert main([*compress, *windows, "--format", "dense"]) == 0
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of([dense], text, VARIANTS[:1])))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2
    assert "shares passages with the calibration text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_is_called_that(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(models[0]), str(tmp_path / "small"), "--bits", "3", "--local"]) == 0
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep_of([tmp_path / "small"], text)))
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2
    assert "already quantized by 'swsc'; restore it first" in capsys.readouterr().err

"""Sweeps of models that do not fit a worker: equal to sweeps of whole models, to the last bit."""

import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from pipeline.blocks.block import Block
from pipeline.engine.memory import Room
from pipeline.engine.task import JobContext, JobOutput
from pipeline.errors import ClusterError, RunError
from pipeline.evaluation.blocks_job import BlockResult, RunBlock
from pipeline.planning.memory import WORKER_BASE
from pipeline.settings.sweep import SweepSettings
from pipeline.settings.validation import validated
from pipeline.sweep.blocks import blocked_models, peak_memory
from pipeline.sweep.inputs import open_inputs
from pipeline.sweep.runs import make_runs
from tests.support.families import MODELS
from tests.support.tiny import make_tiny_model, save_tokenizer

VARIANTS: list[dict[str, Any]] = [
    {"name": "k", "projectors": "k", "bits": 4},
    {"name": "qk", "projectors": "q,k", "bits": 3},
    {"name": "rtn", "method": "rtn", "bits": 3, "projectors": "q,v,down"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "deep", layers=8)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunBlock, BlockResult]]:
    """The block passes of the sweeps of a test, with their results."""
    real, given = RunBlock.run, []

    def run(self: RunBlock, context: JobContext) -> JobOutput[BlockResult]:
        output = real(self, context)
        given.append((self, output.value))
        return output

    monkeypatch.setattr(RunBlock, "run", run)
    return given


def settings_of(model: Path, text: Path, variants: list[dict[str, Any]] = VARIANTS) -> dict[str, Any]:
    evaluations: list[dict[str, Any]] = [
        {"text": str(text), "seqlen": 32, "windows": 5, "batch_size": 2},
        {"text": str(text), "seqlen": 16, "windows": 3},
        {"text": str(text), "seqlen": 16, "windows": 2, "dtype": "bfloat16"},
    ]
    return {"models": [str(model)], "variants": variants, "evaluations": evaluations}


def small_memory(settings: dict[str, Any]) -> str:
    """About the smallest cap, in GiB, under which a sweep can run; the whole model exceeds it."""
    inputs = open_inputs(validated(SweepSettings, settings))
    runs = make_runs(inputs.settings, inputs.checkpoints)
    beyond = (peak_memory(inputs, runs, [0]) - WORKER_BASE).cpu
    for twentieth in range(4, 20):
        room = Room("cpu", WORKER_BASE.cpu + beyond * twentieth // 20)
        with suppress(ClusterError):
            assert blocked_models(inputs, runs, room)
            return str(room.nbytes / 2**30)
    raise AssertionError("the whole model fits")


def swept(settings: dict[str, Any], folder: Path, *flags: str, code: int = 0) -> list[dict[str, Any]]:
    folder.mkdir()
    (folder / "s.yaml").write_text(yaml.safe_dump(settings))
    assert main(["sweep", str(folder / "s.yaml"), "--out", str(folder / "out"), "--local", *flags]) == code
    rows: list[dict[str, Any]] = json.loads((folder / "out" / "results.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_rows_equal_those_of_whole_models_and_blocks_are_read_once_for_all_variants(
    model: Path, text: Path, tmp_path: Path, passes: list[tuple[RunBlock, BlockResult]]
) -> None:
    settings = settings_of(model, text)
    whole = swept(settings, tmp_path / "whole")
    assert not passes
    assert swept(settings, tmp_path / "blocks", "--memory-per-worker", small_memory(settings)) == whole
    assert all(row["perplexity"] for row in whole)
    blocks: dict[str, list[Block]] = defaultdict(list)
    variants: dict[tuple[str, Block], list[str]] = defaultdict(list)
    for job, _ in passes:
        dtype = job.key.model.dtype
        if blocks[dtype][-1:] != [job.block]:
            blocks[dtype].append(job.block)
        if variants[dtype, job.block][-1:] != [job.variant]:
            variants[dtype, job.block].append(job.variant)
    assert {*blocks} == {"auto", "bfloat16"}
    for order in blocks.values():
        assert len(order) == len({*order}) > 1
        assert order[0].is_first
        assert order[-1].is_last
    assert all(order == ["", "k", "qk", "rtn"] for (_, block), order in variants.items() if block.layers)
    # Twice because of the two dtypes; RTN's matrices are not those of the variant before, which are read again.
    assert sum(result.bytes_read for _, result in passes) < 2 * 1.3 * sum(
        file.stat().st_size for file in model.glob("*.safetensors")
    )


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_oss", "opt", "falcon rw", "phi3", "llama 3"])
def test_families(family: str, text: Path, tmp_path: Path, passes: list[tuple[RunBlock, BlockResult]]) -> None:
    path = tmp_path / "model"
    MODELS[family]().save_pretrained(path)
    save_tokenizer(path)
    variants = [
        {"name": "rtn", "method": "rtn", "bits": 3, "include": "."},
        {"name": "k", "method": "rtn", "bits": 2, "projectors": "k"},
    ]
    settings = settings_of(path, text, variants)
    whole = swept(settings, tmp_path / "whole")
    assert swept(settings, tmp_path / "blocks", "--memory-per-worker", small_memory(settings)) == whole
    assert passes


def test_a_variant_that_fails_stops_no_other(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(model, text)
    whole = swept(settings, tmp_path / "whole")
    real = RunBlock.run

    def failing(self: RunBlock, context: JobContext) -> JobOutput[BlockResult]:
        if self.variant == "qk" and not self.block.is_first:
            raise RunError("no such luck")
        return real(self, context)

    monkeypatch.setattr(RunBlock, "run", failing)
    rows = swept(settings, tmp_path / "blocks", "--memory-per-worker", small_memory(settings), code=1)
    assert [row for row in rows if row["variant"] != "qk"] == [row for row in whole if row["variant"] != "qk"]
    failed = [row for row in rows if row["variant"] == "qk"]
    assert all("no such luck" in row["error"] and row["perplexity"] is None for row in failed)


def test_a_model_with_a_layer_that_fits_no_worker_is_refused_before_anything_is_compressed(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(model, text)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(settings))
    argv = ["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--local"]
    assert main([*argv, "--memory-per-worker", "0.4"]) == 2
    assert "the largest layer needs" in capsys.readouterr().err

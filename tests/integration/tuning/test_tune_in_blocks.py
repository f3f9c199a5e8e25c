"""Tuning in blocks of layers: the files are those of workers that hold the whole models, to the byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.engine.task import TaskResult
from pipeline.errors import BlocksUnsupported, PayloadLost, RunError
from pipeline.models.stored_model import Model
from pipeline.planning.memory import tuning_memory
from pipeline.tuning import blocks_flow
from pipeline.tuning import steps as tuning_steps
from pipeline.tuning import windows as tuning_windows
from tests.support.families import FamilyModel
from tests.support.tiny import contents, make_text
from tests.support.tuned_blocks import InProcess, SeveralWorkers, tune_in_blocks, tune_whole, tuning

# tied embeddings, fused queries, keys and values, and experts that transformers fuses
FAMILIES = ("llama 3", "phi3", "mixtral")
SETTINGS = ["--local", "--clusters", "8", "--rank", "2", "--segment-size", "4", "--scaled", "--centroid-bits", "8"]


@pytest.fixture(scope="module", autouse=True)
def short_steps() -> Iterator[None]:
    """Two windows a step, and long ones: the texts here are short. A state is kept after every second of four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_windows, "_STEP_TOKENS", 64)
        patch.setattr(tuning_steps, "_RATE", 0.02)
        patch.setattr(tuning_steps, "_STATE_INTERVAL", 2)
        yield


class Compressed:
    """A tiny model, a compressed form of it, and the files of its tuning by workers that hold both."""

    def __init__(self, name: str, folder: Path, *flags: str) -> None:
        self.model = FamilyModel(name, folder)
        self.path = folder / "compressed"
        argv = ["compress", str(self.model.dense), str(self.path), *SETTINGS]
        assert main([*argv, *(flags or ("--projectors", self.model.roles))]) == 0
        self.whole = tune_whole(tuning(self.model.dense, self.path, folder / "whole"))

    def tuned(self, cache: Path, size: int, pools: InProcess) -> dict[str, bytes]:
        """The files of a tuning in blocks of `size` layers."""
        return tune_in_blocks(tuning(self.model.dense, self.path, cache), size, pools)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return Compressed(request.param, tmp_path_factory.mktemp(request.param.replace(" ", "-")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A model whose embedding and head are compressed, too."""
    include = ("--include", "_proj|embed|lm_head")
    return Compressed("llama 2", tmp_path_factory.mktemp("llama"), *include)


@pytest.mark.parametrize(("size", "n_workers"), [(1, 1), (2, 1), (1, 3)])
def test_files_do_not_depend_on_blocks_and_workers(
    size: int, n_workers: int, family: Compressed, tmp_path: Path
) -> None:
    assert family.tuned(tmp_path, size, InProcess(n_workers, 0)) == family.whole
    assert sorted(family.whole) == ["result.json", "state-00004.safetensors"]
    assert json.loads(family.whole["result.json"])["applied"]


def test_embedding_and_head_are_blocks_that_can_be_tuned(llama: Compressed, tmp_path: Path) -> None:
    assert llama.tuned(tmp_path, 0, InProcess(2, 0)) == llama.whole


def test_blocks_below_the_first_one_with_matrices_have_no_backward_pass(tmp_path: Path) -> None:
    compressed = Compressed("llama 3", tmp_path / "model", "--include", r"layers\.1\..*_proj")
    pools = InProcess(1, 0)
    assert compressed.tuned(tmp_path, 1, pools) == compressed.whole
    assert pools.used[0].tasks.count("StudentBackward") == 8


class Ending(SeveralWorkers):
    """A pool in which the first backward pass of the third step fails."""

    def wait(self) -> TaskResult[Any] | None:
        if self._running[-1][1].label.startswith("tuning step 3,"):
            raise RunError("ended")
        return super().wait()


def test_an_interrupted_tuning_goes_on_from_files(llama: Compressed, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended"):
        llama.tuned(tmp_path, 1, InProcess(1, 0, Ending))
    pools = InProcess(1, 0)
    assert llama.tuned(tmp_path, 1, pools)["state-00004.safetensors"] == llama.whole["state-00004.safetensors"]
    tasks = pools.used[0].tasks
    assert "TeacherForward" not in tasks
    assert tasks.count("TuneStep") == 2 * 2


def test_workers_that_hold_whole_models_resume_a_tuning_in_blocks(llama: Compressed, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended"):
        llama.tuned(tmp_path, 1, InProcess(1, 0, Ending))
    tuned = tune_whole(tuning(llama.model.dense, llama.path, tmp_path))
    assert tuned["state-00004.safetensors"] == llama.whole["state-00004.safetensors"]
    assert tuned.keys() == llama.whole.keys()


class Losing(SeveralWorkers):
    """A pool that loses the inputs of the second task of a kind."""

    kind = ""

    def wait(self) -> TaskResult[Any] | None:
        worker, task = self._running[-1]
        if task.kind == self.kind and self.tasks.count(f"lost {task.kind}") < 2:
            self.tasks.append(f"lost {task.kind}")
            if self.tasks.count(f"lost {task.kind}") == 2:
                self._running.pop()
                return TaskResult(task, error=PayloadLost("gone"), worker=worker)
        return super().wait()


@pytest.mark.parametrize("kind", ["TeacherForward", "StudentForward", "StudentBackward", "StudentDivergence"])
def test_hidden_states_that_are_lost_are_computed_again(
    kind: str, llama: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Losing, "kind", kind)
    pools = InProcess(2, 0, Losing)
    assert llama.tuned(tmp_path, 1, pools) == llama.whole
    assert len(pools.used) == 1


@pytest.mark.parametrize("kind", ["TuneStep", "KeepState"])
def test_a_state_that_is_lost_is_computed_again_from_the_last_one_in_a_file(
    kind: str, llama: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Losing, "kind", kind)
    pools = InProcess(1, 0)
    pools.pool = lambda workers: (SeveralWorkers if pools.used else Losing)(workers)
    tuned = llama.tuned(tmp_path, 1, pools)
    assert tuned["state-00004.safetensors"] == llama.whole["state-00004.safetensors"]
    assert len(pools.used) == 2
    assert "TeacherForward" not in pools.used[1].tasks


def test_a_matrix_outside_the_layers_is_refused_by_name(tmp_path: Path) -> None:
    model = FamilyModel("llava", tmp_path)
    argv = ["compress", str(model.dense), str(tmp_path / "out"), *SETTINGS, "--include", "vision.*q_proj|q_proj"]
    assert main(argv) == 0
    with pytest.raises(BlocksUnsupported, match="vision_tower"):
        tune_in_blocks(tuning(model.dense, tmp_path / "out", tmp_path / "cache"), 1, InProcess(1, 0))


def test_a_limit_of_memory_changes_no_byte_of_an_output(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = blocks_flow.BlockTuning.within

    def within(*arguments: Any) -> blocks_flow.BlockTuning:
        sizes.append(real(*arguments))
        return sizes[-1]

    monkeypatch.setattr(blocks_flow.BlockTuning, "within", within)
    calibration = make_text(tmp_path / "calibration.txt", 400, seed=77)
    flags = ["--calibration", str(calibration), "--calibration-windows", "8", "--calibration-seqlen", "32"]
    argv = [*SETTINGS, "--projectors", "q,k,v,down", "--tune", "1", *flags]
    for name in ("whole", "blocks"):
        cap = (tuning_memory(Model(open_checkpoint(str(tiny_model)), {}), 32, "auto").cpu - 1024) / 2**30
        limit = ["--memory-per-worker", str(cap)] if name == "blocks" else []
        assert main(["compress", str(tiny_model), str(tmp_path / name / "out"), *argv, *limit]) == 0
    assert len(sizes) == 1
    assert len(sizes[0].layout.blocks) > 1
    assert contents(tmp_path / "blocks" / "out") == contents(tmp_path / "whole" / "out")

"""Claims about the files of a plan: each tensor is in one of them, and none is larger than it has to be."""

from typing import Any

import pytest

from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.planning import tasks
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.tasks import LayerTask, bounded_groups
from pipeline.settings.compression import CompressSettings
from tests.unit.pipeline.planning.test_plan import SHAPES, Shapes, checkpoint_of, plan_of

PHI: dict[str, Any] = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
# One layer with a fused tensor of 16 kB and a matrix of 8 kB.
FUSED: Shapes = {
    "model.layers.0.self_attn.qkv_proj.weight": (128, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
}


def fused_plan(dense: bool) -> Plan:
    settings = CompressSettings(projectors=("q", "k", "o"), clusters=4, rank=2)
    return make_plan(checkpoint_of(FUSED, **PHI), settings, dense)


def matrices(task: LayerTask) -> list[MatrixInfo]:
    return [info for info, _ in task.items]


def test_groups_keep_the_order_and_the_limit() -> None:
    assert list(bounded_groups([3, 1, 2, 9, 1], lambda size: size, 4)) == [[3, 1], [2], [9], [1]]
    assert list(bounded_groups([], len, 4)) == []


def test_copied_tensors_are_cut_into_files_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FILE_BYTES", 5000)
    copies = plan_of().copies
    assert len(copies) > 3
    assert all(task.nbytes <= 5000 or len(task.infos) == 1 for task in copies)


def test_a_large_layer_is_cut_into_files_and_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {task.layer: task.items for task in plan_of(projectors="q,k,v").layers}
    monkeypatch.setattr(tasks, "FILE_BYTES", 11_000)  # Q and K of each layer, and V alone
    plan = plan_of(projectors="q,k,v")
    parts: dict[str, list[LayerTask]] = {}
    for task in sorted(plan.layers, key=lambda layer: layer.file):
        parts.setdefault(task.layer, []).append(task)
    assert {layer: tuple(item for task in cut for item in task.items) for layer, cut in parts.items()} == whole
    assert {len(cut) for cut in parts.values()} == {2}
    assert all(task.nbytes <= 11_000 for task in plan.layers)
    files = [task.file for task in plan.layers] + [copy.file for copy in plan.copies]
    assert len(set(files)) == len(files) == len(plan.matrices_by_file)


def test_remaining_rows_are_written_once_with_the_last_matrix_of_their_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FILE_BYTES", 9000)
    cut = {tuple(info.name.split(".")[-2] for info in matrices(task)): task.fused for task in fused_plan(False).layers}
    assert len(cut) == 3, "Q, K and O"
    assert sum(map(len, cut.values())) == 1
    (last,) = (task for task in fused_plan(False).layers if task.fused)
    assert last.fused[0].matrices[-1] in matrices(last)
    assert len(last.fused[0].matrices) == 2


def test_a_tensor_of_the_dense_form_is_in_one_file_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FILE_BYTES", 9000)
    plan = fused_plan(True)
    assert sorted(len(task.items) for task in plan.layers) == [1, 2]
    (fused,) = (task for task in plan.layers if task.fused)
    assert set(fused.fused[0].matrices) == set(matrices(fused))


def test_the_largest_file_is_counted_as_it_is_stored() -> None:
    plan = plan_of(SHAPES, clusters=4, rank=2)
    stored = {decision.info.name: decision.stored_bytes for decision in plan.compressed}
    assert plan.largest_file_bytes == max(sum(stored[info.name] for info in matrices(task)) for task in plan.layers)
    assert fused_plan(True).largest_file_bytes == (64 + 32 + 64) * 64 * 2

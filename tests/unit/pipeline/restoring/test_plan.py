"""Plans of a restoration: every dense tensor goes into exactly one file."""

import pytest
import torch

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.models.stored_model import Model
from pipeline.outputs.owned_files import ADAPTER_FILES
from pipeline.restoring import plan as module
from pipeline.restoring.plan import make_restore_plan
from pipeline.storage.store import Store
from swsc_core import encode
from swsc_core.compressed.entry import Entry
from swsc_core.method.spec import SwscSpec

COMPRESSED = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(2) for role in "qk"]
COPIED = {"model.embed_tokens.weight": "model-00001.safetensors", "model.norm.weight": "model-00002.safetensors"}


@pytest.fixture(scope="module")
def entry() -> Entry:
    return encode(torch.randn(8, 8), [SwscSpec(4, 2)], name="w", seed=0).entry


@pytest.fixture
def model(entry: Entry) -> Model:
    entries = dict.fromkeys(COMPRESSED, entry)
    stored = {part: "model-00001.safetensors" for name in entries for part in _parts(name, entry)}
    tensors = {name: TensorInfo(name, "F32", (8, 8), file, 0, 256) for name, file in {**stored, **COPIED}.items()}
    return Model(Checkpoint(Store("/nowhere"), tensors, {}), entries)


def _parts(name: str, entry: Entry) -> list[str]:
    return list(Model(Checkpoint(Store("/nowhere"), {}, {}), {name: entry}).parts(name).values())


def test_each_tensor_is_in_one_file(model: Model) -> None:
    plan = make_restore_plan(model, {})
    restored = [name for task in plan.restored for name in task.names]
    copied = [info.name for task in plan.copied for info in task.infos]
    assert sorted(restored + copied) == sorted([*COMPRESSED, *COPIED])
    assert len(set(plan.files)) == len(plan.restored) + len(plan.copied) == 2 + 2
    assert plan.nbytes == 256 * (len(COMPRESSED) + len(COPIED))


def test_a_layer_is_restored_into_one_file(model: Model) -> None:
    plan = make_restore_plan(model, {})
    assert [set(task.names) for task in plan.restored] == [set(COMPRESSED[:2]), set(COMPRESSED[2:])]


def test_a_large_layer_is_cut_into_files(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 300)
    plan = make_restore_plan(model, {})
    assert [task.names for task in plan.restored] == [(name,) for name in COMPRESSED]
    assert plan.files == [f"model-{number:05d}-of-00006.safetensors" for number in range(1, 7)]
    assert plan.largest_file_bytes == 256


def test_the_report_states_what_the_adapter_holds(model: Model) -> None:
    plan = make_restore_plan(model, {COMPRESSED[0]: "model.layers.0.self_attn.q_proj"})
    reasons = {str(row["name"]): str(row["reason"]) for row in plan.rows()}
    assert "adapter" in reasons[COMPRESSED[0]]
    assert all("whole" in reasons[name] for name in COMPRESSED[1:])
    assert {row["action"] for row in plan.rows() if row["name"] in COPIED} == {"copied"}
    assert set(ADAPTER_FILES) <= set(plan.files)
    assert plan.adapter_bytes == 4 * 2 * (8 + 8)

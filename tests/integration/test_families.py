"""One model of each family: planned, compressed by role, restored. Its tensors are told apart by the names of hub checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch

from pipeline.config import CompressSettings
from pipeline.model.checkpoint import open_checkpoint
from pipeline.model.matrices import tensor_of
from pipeline.model.plan import make_plan
from swsc_core import decode
from tests.families import FamilyModel, tensors_of

# what is no matrix that every token is multiplied by: embeddings, heads, routers, norms, biases, all that looks at pictures
_OTHERS = re.compile(
    r"embed|wte|wpe|lm_head|(mlp|moe)\.gate\.weight|shared_expert_gate|norm|ln_|\.bias$|vision|visual|projector|correction_bias"
)


def by_hand(family: FamilyModel, compressed: Path) -> dict[str, torch.Tensor]:
    """The dense tensors that a compressed directory stands for, by the words of its format alone."""
    stored, dense = tensors_of(compressed), tensors_of(family.dense)
    entries = json.loads((compressed / "config.json").read_text())["quantization_config"]["tensors"]
    for name, entry in entries.items():
        stem = name.removesuffix("weight")
        matrix = decode({part.removeprefix(stem): own for part, own in stored.items() if part.startswith(stem)}, entry)
        whole = dense[entry.get("tensor") or name]
        whole = whole.T if entry.get("transposed") else whole
        first, length, stride, count = entry.get("rows") or (0, len(whole), len(whole), 1)
        for block in range(count):
            start = first + block * stride
            whole[start : start + length] = matrix[block * length : (block + 1) * length]
    return dense


def test_the_plan_covers_every_tensor(family: FamilyModel) -> None:
    source = open_checkpoint(str(family.dense))
    plan = make_plan(source, CompressSettings(projectors=family.roles, clusters=4, rank=2))
    written = [tensor_of(info) for task in plan.layers for info, _ in task.items]
    written += [info.name for task in plan.copies for info in task.infos]
    assert set(written) == source.tensors.keys()
    assert plan.weights == source.weights
    assert all(decision.reason for decision in plan.decisions)


def test_all_roles_are_everything_linear(family: FamilyModel) -> None:
    plan = make_plan(open_checkpoint(str(family.dense)), CompressSettings(projectors=family.roles, clusters=4, rank=2))
    left = {d.info.name for d in plan.decisions if d.action != "compressed"}
    assert not [name for name in left if not _OTHERS.search(name)]
    assert not [d.info.name for d in plan.compressed if _OTHERS.search(d.info.name)]


@pytest.mark.parametrize("selection", ["queries_and_keys", "compressed"])
def test_the_restored_model_is_the_one_of_the_compressed_weights(family: FamilyModel, selection: str) -> None:
    compressed = getattr(family, selection)
    restored, wanted = family.restored(compressed), by_hand(family, compressed)
    found = tensors_of(restored)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((family.dense / "config.json").read_text())
    assert json.loads((restored / "config.json").read_text()) == config
    kind, hand = family.load(restored), family.load(family.dense)
    hand = type(hand).from_pretrained(None, config=hand.config, state_dict=wanted).eval()
    assert torch.equal(family.logits(kind), family.logits(hand))
    assert not torch.equal(family.logits(kind), family.logits(family.load(family.dense)))


def test_the_dense_form_is_what_restoring_gives(family: FamilyModel) -> None:
    dense = family.compress("dense-form", "--projectors", "q,k", "--format", "dense")
    restored = tensors_of(family.restored(family.queries_and_keys))
    written = tensors_of(dense)
    assert written.keys() == restored.keys()
    for name, tensor in restored.items():
        assert torch.equal(written[name], tensor), name


def test_tensors_that_were_not_selected_are_the_same_to_the_byte(family: FamilyModel) -> None:
    before, after = tensors_of(family.dense), tensors_of(family.restored(family.queries_and_keys))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(re.search(r"q_|k_proj|kv_|qkv|query_key_value|c_attn", name) for name in changed)

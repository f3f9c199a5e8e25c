"""One model of each family: planned, compressed by role, restored. Its tensors have the names of hub checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXForCausalLM

from jobs.cli import main
from pipeline.checkpoints.source import open_checkpoint
from pipeline.checkpoints.weight_files import INDEX
from pipeline.models.stored_model import open_model
from pipeline.planning.plan import make_plan
from pipeline.settings.compression import CompressSettings
from swsc_core import decode
from swsc_core.compressed.registry import entry_of
from tests.support.families import STACKED, FamilyModel, tensors_of
from tests.support.tiny import make_text

# what is no matrix that every token is multiplied by: embeddings, heads, routers, norms, biases, all that looks at
# pictures
_OTHERS = re.compile(
    r"embed|wte|wpe|lm_head|(mlp|moe)\.gate\.weight|router|sinks|shared_expert_gate|norm|ln_|bias$|vision|visual|projector|correction_bias"
)


def by_hand(family: FamilyModel, compressed: Path) -> dict[str, torch.Tensor]:
    """The dense tensors that a compressed directory stands for, by the words of its format alone."""
    stored, dense = tensors_of(compressed), tensors_of(family.dense)
    entries = json.loads((compressed / "config.json").read_text())["quantization_config"]["tensors"]
    for name, entry in entries.items():
        stem = name.removesuffix("weight")
        matrix = decode(
            {part.removeprefix(stem): own for part, own in stored.items() if part.startswith(stem)}, entry_of(entry)
        )
        whole = dense[entry.get("tensor") or name]
        whole = whole.transpose(-2, -1) if entry.get("transposed") else whole
        if "stacked" in entry:  # rows are counted through all of its matrices; none is in two
            number, first = divmod(entry["rows"][0], whole.shape[1])
            entry, whole = {**entry, "rows": [first, *entry["rows"][1:]]}, whole[number]
        first, length, stride, count = entry.get("rows") or (0, len(whole), len(whole), 1)
        for block in range(count):
            start = first + block * stride
            whole[start : start + length] = matrix[block * length : (block + 1) * length]
    return dense


def test_the_plan_covers_every_tensor(family: FamilyModel) -> None:
    source = open_checkpoint(str(family.dense))
    plan = make_plan(source, CompressSettings(projectors=family.roles, clusters=4, rank=2))
    written = [matrix.tensor.name for task in plan.layers for matrix, _ in task.items]
    written += [info.name for task in plan.copies for info in task.infos]
    assert set(written) == source.tensors.keys()
    assert plan.weights == source.weights
    assert {decision.info.name for decision in plan.decisions if decision.reason} >= source.tensors.keys()


def test_all_roles_are_everything_linear(family: FamilyModel) -> None:
    plan = make_plan(open_checkpoint(str(family.dense)), CompressSettings(projectors=family.roles, clusters=4, rank=2))
    left = {d.info.name for d in plan.decisions if d.action not in ("compressed", "split")}
    assert not [name for name in left if not _OTHERS.search(name)]
    assert not [d.info.name for d in plan.compressed if _OTHERS.search(d.info.name)]


@pytest.mark.parametrize("selection", ["queries_and_keys", "compressed"])
def test_the_restored_model_is_the_one_of_the_compressed_weights(family: FamilyModel, selection: str) -> None:
    compressed = getattr(family, selection)
    restored, expected = family.restored(compressed), by_hand(family, compressed)
    found = tensors_of(restored)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((family.dense / "config.json").read_text())
    assert json.loads((restored / "config.json").read_text()) == config
    kind, hand = family.load(restored), family.load(family.dense)
    hand = type(hand).from_pretrained(None, config=hand.config, state_dict=expected).eval()
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


# Families whose matrices are fused, stacked or part of a larger model, and the roles of those that are.
_FUSED = {
    "gpt_neox": "q,k,v",
    "falcon 40b": "q,k,v",
    "deepseek_v3": "q,k,v,experts",
    "llava": "q,k",
    **dict.fromkeys(STACKED, "q,experts"),
}


@pytest.mark.parametrize("name", _FUSED)
def test_fused_matrices_and_language_parts_are_calibrated_tuned_and_evaluated(
    name: str, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    model = FamilyModel(name, tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model.dense / file).write_bytes((tiny_model / file).read_bytes())
    calibration = make_text(tmp_path / "calibration.txt", 1500, seed=77)
    flags = ["--preset", "best", "--bits", "4.5", "--projectors", _FUSED[name], "--calibration-windows", "4"]
    flags += ["--calibration", str(calibration), "--calibration-seqlen", "32", "--local"]
    out = tmp_path / "best"
    assert main(["compress", str(model.dense), str(out), *flags]) == 0
    report = json.loads((out / "swsc_report.json").read_text())
    assert report["compressed_bits_per_weight"] <= 4.5
    assert report["tuning"]["steps"] > 0
    assert main(["evaluate", str(out), "--text", str(text), "--seqlen", "32", "--windows", "2", "--local"]) == 0


def test_layers_after_the_last_are_kept_to_the_byte_and_do_not_disturb(
    tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    """Heads that predict several tokens at once are one layer more than the config has (DeepSeek-V3's layer 61)."""
    model = FamilyModel("deepseek_v3", tmp_path)
    extra = {
        f"model.layers.2.{name.split('.', 3)[3]}": tensor.clone()
        for name, tensor in tensors_of(model.dense).items()
        if name.startswith("model.layers.1.")
    } | {"model.layers.2.eh_proj.weight": torch.randn(64, 128)}
    save_file(extra, model.dense / "extra.safetensors")
    index = json.loads((model.dense / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (model.dense / INDEX).write_text(json.dumps(index))
    restored = tensors_of(model.restored(model.compressed))
    assert all(torch.equal(restored[name], tensor) for name, tensor in extra.items())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model.compressed / file).write_bytes((tiny_model / file).read_bytes())
    argv = ["evaluate", str(model.compressed), "--text", str(text), "--seqlen", "32", "--windows", "2", "--local"]
    assert main(argv) == 0


class TestDamagedPieces:
    """The entries of config.json are untrusted: each false one is one error line before anything is decoded."""

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
        """A compressed GPT-NeoX, and its entries, to be changed."""
        model = FamilyModel("gpt_neox", tmp_path)
        config = json.loads((model.queries_and_keys / "config.json").read_text())
        return model.queries_and_keys, config

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"rows": [16, 16, 48, 4]}, "pieces overlap"),
            ({"rows": [150, 16, 48, 4]}, "the 192 rows"),
            ({"rows": [0, 64, 0, 1]}, "has no rows"),
            ({"rows": [0, 1, 1, 1 << 30]}, "64 rows of its shape"),
            ({"rows": [0, 16, 48]}, "rows is "),
            ({"rows": None}, "rows is "),
            ({"tensor": "gpt_neox.layers.9.attention.query_key_value.weight"}, "gpt_neox.layers"),
            ({"tensor": "gpt_neox.layers.0.input_layernorm.weight"}, "gpt_neox.layers"),
            ({"transposed": True}, "differ in columns, dtype, transposed"),
            ({"transposed": "yes"}, "transposed is yes"),
        ],
    )
    def test_it_is_refused(
        self, damaged: tuple[Path, dict[str, Any]], change: dict[str, Any], expected: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        directory, config = damaged
        name = "gpt_neox.layers.0.attention.query_key_value.q.weight"
        config["quantization_config"]["tensors"][name] |= change
        (directory / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        assert main(["restore", str(directory), f"{directory}-dense", "--local"]) == 2
        printed = capsys.readouterr().err
        assert len(printed.splitlines()) == 1
        assert expected in printed

    def test_stock_transformers_refuses_the_remaining_rows_of_a_fused_tensor(
        self, damaged: tuple[Path, dict[str, Any]]
    ) -> None:
        """Remaining rows have the tensor's own name: a loader that does not know pieces finds a wrong shape."""
        directory, config = damaged
        del config["quantization_config"]
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="mismatch"):
            GPTNeoXForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("version", [2, 3])
def test_an_output_of_an_older_version_is_read_on(version: int, tmp_path: Path) -> None:
    model = FamilyModel("llama 2", tmp_path)
    config = json.loads((model.queries_and_keys / "config.json").read_text())
    restored = tensors_of(model.restored(model.queries_and_keys))
    config["quantization_config"]["format_version"] = version
    (model.queries_and_keys / "config.json").write_text(json.dumps(config))
    old = open_model(str(model.queries_and_keys))
    assert all(torch.equal(old.read(name), tensor) for name, tensor in restored.items())

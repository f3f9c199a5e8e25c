"""Whatever is selected, the output opens.

Tensors that transformers renames, splits or fuses while loading among them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jobs.cli import main
from tests.support.families import MODELS, FamilyModel, tensors_of
from tests.support.tiny import make_text, save_tokenizer

t: Any = transformers  # its config classes take more arguments than their annotations name

_SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_HEADLESS = {key: value for key, value in _SIZES.items() if key != "head_dim"}
OTHERS: dict[str, Callable[[], Any]] = {
    "phimoe, a router renamed": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**_HEADLESS, num_local_experts=4)),
    "granitemoe, a router renamed": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**_HEADLESS, num_local_experts=4, num_experts_per_tok=2)
    ),
    "hy_v3, a linear router renamed": lambda: t.HYV3ForCausalLM(t.HYV3Config(**_SIZES, **_EXPERTS)),
    "inkling2, a head renamed": lambda: t.Inkling2ForCausalLM(
        t.Inkling2TextConfig(**_SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
    ),
    "deepseek_v4, names that are left alone": lambda: t.DeepseekV4ForCausalLM(
        t.DeepseekV4Config(
            **_SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, q_lora_rank=16,
            qk_rope_head_dim=8,
            sliding_window=16, index_n_heads=2, index_head_dim=16, index_topk=8,
        )
    ),
}  # fmt: skip
_COARSE = ["--method", "rtn", "--bits", "8", "--granularity", "tensor", "--local"]


def compress(family: FamilyModel, *flags: str) -> Path:
    """Every matrix selected."""
    output = family.folder / "everything"
    assert main(["compress", str(family.dense), str(output), "--include", ".", *_COARSE, *flags]) == 0
    return output


def decisions(output: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((output / "swsc_report.json").read_text())
    return {row["name"]: row for row in report["tensors"]}


def test_every_family_opens_with_all_of_its_matrices_selected(family: FamilyModel) -> None:
    compressed = compress(family)
    assert family.off(family.load(compressed), family.load(family.restored(compressed))) <= 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_renamed_is_restored_and_saved_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, OTHERS[name])
    family = FamilyModel(name, tmp_path)
    compressed = compress(family)
    router = next(
        row for key, row in decisions(compressed).items() if key.endswith(("gate.weight", "router.layer.weight"))
    )
    assert router["action"] == "compressed"
    model, restored = family.load(compressed), family.load(family.restored(compressed))
    assert family.off(model, restored) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(family.logits(family.load(tmp_path / "saved")), family.logits(model))
    model.dequantize()
    assert torch.equal(family.logits(model), family.logits(restored))


def test_a_router_that_chooses_experts_itself_is_named_by_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = t.PhimoeConfig(**_HEADLESS, num_local_experts=16)
    monkeypatch.setitem(MODELS, "phimoe", lambda: t.PhimoeForCausalLM(config))
    dense, text = FamilyModel("phimoe", tmp_path).dense, make_text(tmp_path / "text.txt", 400)
    save_tokenizer(dense)
    flags = [
        "--calibration",
        str(text),
        "--calibration-windows",
        "2",
        "--calibration-seqlen",
        "32",
        "--local",
        "--bits",
        "8",
    ]
    assert (
        main(["compress", str(dense), str(tmp_path / "out"), "--preset", "best", "--include", r"0\..*\.gate\.", *flags])
        == 2
    )
    printed = capsys.readouterr().err
    assert "block_sparse_moe.gate.weight" in printed
    assert "--exclude" in printed


def test_what_is_split_while_loading_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = t.HrmTextConfig(**_SIZES)
    monkeypatch.setitem(MODELS, "hrm_text", lambda: t.HrmTextForCausalLM(config))
    family = FamilyModel("hrm_text", tmp_path)
    compressed = compress(family)
    rows = {name: row for name, row in decisions(compressed).items() if "gate_up_proj" in name or "gqkv_proj" in name}
    assert rows
    assert {row["action"] for row in rows.values()} == {"copied"}
    assert all("splits" in row["reason"] for row in rows.values())
    dense, stored = tensors_of(family.dense), tensors_of(compressed)
    assert all(torch.equal(dense[name], stored[name]) for name in rows)
    assert family.off(family.load(compressed), family.load(family.restored(compressed))) <= 1e-5


def test_restored_weights_may_be_of_what_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "hrm_text", lambda: t.HrmTextForCausalLM(t.HrmTextConfig(**_SIZES)))
    family = FamilyModel("hrm_text", tmp_path)
    compressed = compress(family, "--format", "dense")
    assert all(row["action"] == "compressed" for name, row in decisions(compressed).items() if "gate_up" in name)
    family.load(compressed)


def test_only_such_tensors_selected_is_refused_by_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "hrm_text", lambda: t.HrmTextForCausalLM(t.HrmTextConfig(**_SIZES)))
    family = FamilyModel("hrm_text", tmp_path)
    assert main(["plan", str(family.dense), "--include", "gate_up_proj", "--method", "rtn", "--bits", "4"]) == 2
    printed = capsys.readouterr().err
    assert "gate_up_proj.weight" in printed
    assert "splits" in printed


def test_a_weight_that_the_class_has_no_place_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        key: _SIZES[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    monkeypatch.setitem(MODELS, "bert", lambda: t.BertForPreTraining(t.BertConfig(**sizes)))
    family = FamilyModel("bert", tmp_path)
    config = json.loads((family.dense / "config.json").read_text())
    (family.dense / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    compressed = compress(family)
    assert decisions(compressed)["bert.pooler.dense.weight"]["action"] == "copied"
    t.BertForMaskedLM.from_pretrained(compressed)


_TEXT: dict[str, Any] = {**_SIZES, **_EXPERTS}
_MRL: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def test_a_class_that_initializes_the_experts_of_a_block_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = t.Qwen3OmniMoeThinkerConfig(
        text_config={**_TEXT, **_MRL},
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 48,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        },
        audio_config={
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16,
            "output_dim": 64,
            "downsample_hidden_size": 16,
        },
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "thinker", lambda: t.Qwen3OmniMoeThinkerForConditionalGeneration(config))
    family = FamilyModel("thinker", tmp_path)
    compressed = compress(family)
    assert family.off(family.load(compressed), family.load(family.restored(compressed))) <= 1e-5


def test_a_stack_outside_of_layers_is_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language = {**_HEADLESS, "n_routed_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
                "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    config = t.Kimi_K25Config(text_config=language, vision_config=vision)
    monkeypatch.setitem(MODELS, "kimi", lambda: t.Kimi_K25ForConditionalGeneration(config))
    family = FamilyModel("kimi", tmp_path)
    compressed = compress(family)
    model, restored = family.load(compressed), family.load(family.restored(compressed))
    assert decisions(compressed)["vision_tower.patch_embed.pos_emb.weight"]["action"] == "split"
    table = "model.vision_tower.patch_embed.pos_emb.position_embeddings"
    assert torch.equal(model.get_parameter(table), restored.get_parameter(table))

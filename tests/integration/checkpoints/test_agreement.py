"""Files and config.json of different models are refused before any work, in one line that names the wrong one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm46VForConditionalGeneration,
    GlmgaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from jobs.cli import main
from pipeline.checkpoints.weight_files import SINGLE
from pipeline.errors import CheckpointError
from pipeline.models.agreement import require_agreement
from pipeline.models.stored_model import open_model
from tests.support.tiny import make_tiny_model

Weights = dict[str, torch.Tensor]
_COARSE = ["--clusters", "4", "--rank", "2", "--n-init", "1", "--preset", "paper", "--local"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in one file, its head not tied."""
    return make_tiny_model(tmp_path_factory.mktemp("whole") / "model", layers=2, shards=False, tied=False)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def rewrite(model: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(model / SINGLE))
    save_file({name: tensor.clone() for name, tensor in weights.items()}, model / SINGLE)


def renamed(pattern: str, by: str) -> Callable[[Weights], Weights]:
    return lambda weights: {re.sub(pattern, by, name): tensor for name, tensor in weights.items()}


def without(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if not re.search(pattern, name)}


def refusal(model: Path, measured: bool = True) -> str:
    with pytest.raises(CheckpointError) as caught:
        require_agreement(open_model(str(model)), measured=measured)
    assert "\n" not in str(caught.value)
    assert "download" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_hidden_layers": 1}, ["1 layers", "model.layers.1.", "config.json"]),
        ({"num_hidden_layers": 4}, ["4 layers", "layer 1", "model.layers.2."]),
        ({"num_hidden_layers": 5000}, ["5000 layers", "21 tensors"]),
        ({"vocab_size": 300}, ["[256, 64]", "[300, 64]", "config.json"]),
        ({"intermediate_size": 64}, ["[64, 96]", "[64, 64]"]),
        ({"attention_bias": True}, ["lack 8 weights", "k_proj.bias first", "LlamaForCausalLM", "repair config.json"]),
        ({"num_attention_heads": 3}, ["config.json", "not a multiple", "attention heads (3)"]),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            ["k_proj.bias first", "Qwen2ForCausalLM", "repair config.json"],
        ),
    ],
)
def test_a_config_of_another_model(model: Path, changes: dict[str, Any], facts: list[str]) -> None:
    configure(model, **changes)
    printed = refusal(model)
    assert all(fact in printed for fact in facts), printed


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (renamed("^", "module."), ["'module.'", "Distributed"]),
        (renamed("^", "_orig_mod."), ["'_orig_mod.'", "torch.compile"]),
        (renamed("^", "module._orig_mod."), ["'module._orig_mod.'"]),
        (renamed("^", "base_model.model."), ["'base_model.model.'", "merge"]),
        (renamed("^", "llm."), ["'llm.'"]),
        (renamed(r"layers\.(\d)", r"layers.\1._orig_mod"), ["'_orig_mod.'"]),
        (renamed(r"(q|v)_proj\.", r"\1_proj.base_layer."), ["'base_layer.'", "merge"]),
        (without("lm_head"), ["lm_head.weight", "tie_word_embeddings"]),
        (without(r"layers\.1\.mlp"), ["lack 3 weights", "model.layers.1.mlp.down_proj.weight first", "all files"]),
        (lambda weights: weights | {"v_head.weight": torch.ones(1, 64)}, ["unknown", "v_head.weight"]),
        (lambda weights: weights | {"model.layers.2.norm.weight": torch.ones(64)}, ["2 layers", "model.layers.2."]),
    ],
)
def test_files_of_another_model(model: Path, change: Callable[[Weights], Weights], facts: list[str]) -> None:
    rewrite(model, change)
    printed = refusal(model)
    assert all(fact in printed for fact in facts), printed


@pytest.mark.parametrize(
    "verb",
    [["plan", "M"], ["compress", "M", "O", *_COARSE], ["evaluate", "M", "--text", "T", "--seqlen", "32", "--local"]],
    ids=lambda verb: str(verb[0]),
)
def test_every_verb_refuses_before_work(
    verb: list[str], model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(model, num_hidden_layers=1)
    place = {"M": str(model), "O": str(tmp_path / "output"), "T": str(text)}
    assert main([place.get(word, word) for word in verb]) == 2
    assert "1 layers" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_a_sweep_refuses_before_work(model: Path, text: Path, tmp_path: Path) -> None:
    configure(model, num_hidden_layers=1)
    (tmp_path / "sweep.yaml").write_text(
        json.dumps(
            {
                "models": [str(model)],
                "variants": [{"name": "one", "clusters": 4, "rank": 2, "preset": "paper"}],
                "evaluations": [{"text": str(text), "seqlen": 32}],
            }
        )
    )
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--local"]) == 2


@pytest.mark.parametrize("verb", ["restore", "evaluate"])
def test_a_compressed_model_is_compared_too(verb: str, model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert main(["compress", str(model), str(output), *_COARSE]) == 0
    require_agreement(open_model(str(output)), measured=True)
    configure(output, num_hidden_layers=1)
    rest = [str(tmp_path / "dense")] if verb == "restore" else ["--text", str(text), "--seqlen", "32"]
    assert main([verb, str(output), *rest, "--local"]) == 2
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head_may_be_compressed_and_not_measured(kind: Any, whole: Path, tmp_path: Path) -> None:
    kind.from_pretrained(whole).save_pretrained(tmp_path / "model")
    assert require_agreement(open_model(str(tmp_path / "model"))) == []
    assert "lm_head.weight" in refusal(tmp_path / "model")


def test_what_a_family_was_trained_with_at_first_is_no_stray_weight(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertForPreTraining(config).save_pretrained(tmp_path)  # with a pooler and a head beside what is named
    configure(tmp_path, architectures=[BertForMaskedLM.__name__])
    assert "4 tensors" in require_agreement(open_model(str(tmp_path)))[0]
    rewrite(tmp_path, lambda weights: weights | {"score.weight": torch.ones(2, 16)})
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        require_agreement(open_model(str(tmp_path)))


def test_of_several_ties_one_may_be_given_up(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, is_decoder=True
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda weights: (
            weights
            | {
                "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"] + 1,
                "cls.predictions.decoder.bias": weights["cls.predictions.bias"],
            }
        ),
    )
    model = open_model(str(tmp_path))
    assert require_agreement(model, measured=True) == []
    assert {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} <= {*model.names}


@pytest.mark.parametrize("named", [None, [], ["LlamaForRewardModel"]])
def test_a_head_that_nobody_names_is_no_fault_of_the_files(
    named: list[str] | None, whole: Path, tmp_path: Path
) -> None:
    LlamaModel.from_pretrained(whole).save_pretrained(tmp_path)
    rewrite(tmp_path, renamed("^", "model."))
    rewrite(tmp_path, lambda weights: weights | {"score.weight": torch.ones(1, 64)})
    configure(tmp_path, architectures=named)
    assert "score.weight" in require_agreement(open_model(str(tmp_path)))[0]
    assert "lm_head.weight" in refusal(tmp_path)
    rewrite(tmp_path, without(r"layers\.1\.mlp"))
    assert "mlp" in refusal(tmp_path, measured=False)


def test_files_of_code_that_a_model_brings_are_not_held_against_another_class(model: Path) -> None:
    configure(model, auto_map={"AutoModel": "modeling_own.OwnModel"})
    rewrite(model, renamed("self_attn", "mixer"))
    for trusted in (False, True):
        assert "not compared" in require_agreement(open_model(str(model)), trusted)[0]
    assert "--trust-remote-code" in refusal(model)


def test_a_config_of_a_kind_of_its_own_goes_to_the_class_that_transformers_chooses(tmp_path: Path) -> None:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 8,
    }  # fmt: skip
    config: Any = GlmgaConfig(
        text_config=shape, vision_config=shape
    )  # another one than Glm46VForConditionalGeneration's
    Glm46VForConditionalGeneration(config).save_pretrained(tmp_path)
    assert require_agreement(open_model(str(tmp_path)), measured=True) == []


def test_heads_that_predict_further_tokens_are_known(tmp_path: Path) -> None:
    further: dict[str, Any] = {"num_nextn_predict_layers": 1}
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **further,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {"model.layers.2.eh_proj.weight": torch.ones(4, 8)})
    assert require_agreement(open_model(str(tmp_path)), measured=True) == []
    rewrite(tmp_path, without(r"layers\.1\.mlp\.experts\.3\."))
    assert "experts" in refusal(tmp_path)


def test_tensors_that_are_no_weights_are_copied_and_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(model, lambda weights: weights | {"model.layers.0.self_attn.steps": torch.ones(3, dtype=torch.int64)})
    assert main(["compress", str(model), str(tmp_path / "output"), *_COARSE]) == 0
    printed = capsys.readouterr().err
    assert "model.layers.0.self_attn.steps" in printed
    assert "Loading weights" not in printed
    assert "model.layers.0.self_attn.steps" in open_model(str(tmp_path / "output")).names


def test_a_model_that_transformers_does_not_know_is_reported_as_not_compared(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(model, model_type="unheard_of", architectures=["UnheardOf"])
    assert "unheard_of" in require_agreement(open_model(str(model)))[0]
    assert main(["plan", str(model), "--include", "q_proj"]) == 0
    assert "not compared" in capsys.readouterr().err
    assert "unheard_of" in refusal(model)

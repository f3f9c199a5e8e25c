"""Encoders, which transformers opens as models that predict the next token, are not measured as such."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jobs.cli import main
from pipeline.models.causality import non_causal_setting
from tests.support.tiny import make_text, save_tokenizer

t: Any = transformers  # its config classes take more arguments than their annotations name

_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_XLM = {"vocab_size": 256, "emb_dim": 32, "n_layers": 1, "n_heads": 2, "embed_init_std": 0.2, "init_std": 0.2}
_XLNET = {"vocab_size": 256, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "initializer_range": 0.2}
_GEMMA = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"], "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "bert": lambda: t.BertLMHeadModel(t.BertConfig(**_SHAPE)),
    "bert as a decoder": lambda: t.BertLMHeadModel(t.BertConfig(**_SHAPE, is_decoder=True)),
    "roberta": lambda: t.RobertaForCausalLM(t.RobertaConfig(**_SHAPE)),
    "electra": lambda: t.ElectraForCausalLM(t.ElectraConfig(**_SHAPE, embedding_size=32)),
    "xlm": lambda: t.XLMWithLMHeadModel(t.XLMConfig(**_XLM)),
    "xlm, causal": lambda: t.XLMWithLMHeadModel(t.XLMConfig(**_XLM, causal=True)),
    "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(**_XLNET)),
    "embedding gemma": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA, use_bidirectional_attention=True)),
    "gemma 3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_SHAPE)),
    "bart": lambda: t.BartForCausalLM(
        t.BartConfig(vocab_size=256, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_causality_of_the_config_is_that_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.arange(5, 13)[None]
    other = ids.clone()
    other[0, -1] = 77
    with torch.no_grad():
        one, two = (model(input_ids=own).logits[0, :-1] for own in (ids, other))
    assert bool(non_causal_setting(model)) == (float((one - two).abs().max()) > 1e-4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as it is published: by the class that fills in masked tokens."""
    path = tmp_path_factory.mktemp("encoder") / "bert"
    t.BertForMaskedLM(t.BertConfig(**_SHAPE)).save_pretrained(path)
    save_tokenizer(path)
    return path


def test_an_encoder_has_no_perplexity(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, include = str(make_text(tmp_path / "text.txt")), ["--include", "query", "--bits", "8", "--method", "rtn"]
    measured = ["--text", text, "--seqlen", "32", "--local"]
    assert main(["evaluate", str(encoder), *measured]) == 2
    assert "is_decoder is false" in capsys.readouterr().err
    assert main(["compress", str(encoder), str(tmp_path / "out"), *include, *measured]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["compress", str(encoder), str(tmp_path / "out"), *include, "--local"]) == 0

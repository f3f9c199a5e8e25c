"""Tokens and positions that a model has no row for are refused before any work."""

from typing import Any

import numpy as np
import pytest

from pipeline.architectures.families import has_position_table
from pipeline.errors import TextError
from pipeline.texts.windows import require_within


def source(names: list[str], **config: Any) -> Any:
    return type("Source", (), {"config": config, "tensors": dict.fromkeys(names)})()


LLAMA = source(["model.embed_tokens.weight"], vocab_size=10, max_position_embeddings=4, model_type="llama")
GPT2 = source(["wte.weight", "wpe.weight"], vocab_size=10, n_positions=4, model_type="gpt2")
GPTJ = source(["transformer.wte.weight"], vocab_size=10, n_positions=4, model_type="gptj")
SEEING = source(["language_model.x"], model_type="llava", text_config={"vocab_size": 10})
UNSAID = source(["x"], model_type="own")


@pytest.mark.parametrize("model", [LLAMA, GPT2, GPTJ, SEEING])
def test_a_token_beyond_the_vocabulary_is_refused(model: Any) -> None:
    require_within(np.full((2, 4), 9), model)
    with pytest.raises(TextError, match="vocabulary of 10 tokens"):
        require_within(np.array([[0, 10, 0, 0]]), model)


@pytest.mark.parametrize("model", [GPT2, GPTJ])
def test_a_position_beyond_a_table_is_refused(model: Any) -> None:
    with pytest.raises(TextError, match="4 positions"):
        require_within(np.zeros((1, 5), dtype=np.int64), model)


@pytest.mark.parametrize("model", [LLAMA, SEEING, UNSAID])
def test_longer_windows_are_taken_where_positions_are_calculated(model: Any) -> None:
    require_within(np.zeros((1, 50), dtype=np.int64), model)


@pytest.mark.parametrize(
    "name", ["transformer.wpe.weight", "model.decoder.embed_positions.weight", "model.position_embeddings.weight"]
)
def test_tables_of_positions_are_known_by_name(name: str) -> None:
    assert has_position_table({}, [name])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "model.visual.pos_embed.weight",
    ],
)
def test_others_are_not(name: str) -> None:
    assert not has_position_table({}, [name])

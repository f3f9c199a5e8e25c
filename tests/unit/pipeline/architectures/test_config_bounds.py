"""Numbers of a config by which a model would be built for ever, or out of all memory, are refused.

Those of real models are not.
"""

import pytest
from transformers import CONFIG_MAPPING

from pipeline.architectures.config_bounds import require_buildable
from pipeline.errors import CheckpointError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("n_layer", 10**6), ("num_local_experts", 10**9), ("head_dim", 10**12),
        ("vocab_size", 10**400),
        ("num_attention_heads", 2**31), ("hidden_sizes", [64, 10**10]), ("kv_lora_rank", float("inf")),
        ("n_embd", 10**9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", ["", "text_config", "vision_config"])
def test_what_no_model_has(key: str, value: object, inside: str) -> None:
    config = {inside: {key: value}} if inside else {key: value}
    with pytest.raises(CheckpointError, match=f"x: {key} is"):
        require_buildable("x", config)


def test_lengths_of_texts_a_quantization_and_notes_of_a_training_are_free() -> None:
    free: dict[str, object] = {
        "max_position_embeddings": 10**9,
        "sliding_window": 2**40,
        "model_max_length": 10**30,
        "rope_theta": 10**12,
    }
    free |= {"seq_length": 2**25, "training": {"param_count": 7e9, "total_token_count": 10**13}, "dataset_size": 10**9}
    require_buildable("x", {**free, "quantization_config": {"size": 10**12}, "attention_chunk_size": 2**30})


def test_defaults_of_every_family_are_within_the_bounds() -> None:
    checked = 0
    for kind in CONFIG_MAPPING.values():
        try:
            config = kind().to_dict()
        except Exception:
            continue
        require_buildable(kind.__name__, config)
        checked += 1
    assert checked > 200

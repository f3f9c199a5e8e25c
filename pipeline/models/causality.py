"""Check that a model is causal.

The perplexity of an encoder is meaningless, because an encoder attends to the token that it predicts.

transformers also loads encoders as causal models and only logs a warning (BERT and its relatives, XLM, XLNet,
EmbeddingGemma).
"""

from typing import Any

from pipeline.checkpoints.meta_model import UnknownModel, meta_models_of
from pipeline.errors import CheckpointError
from pipeline.models.stored_model import Model


def require_causal(model: Model, trusted: bool = False) -> None:
    """Raise CheckpointError if tokens attend to later tokens. A model with its own code is not checked if `trusted`."""
    checkpoint = model.checkpoint
    if (trusted and "auto_map" in checkpoint.config) or not checkpoint.files:
        return
    try:
        model_with_head = meta_models_of(checkpoint.config, checkpoint.store.root, len(checkpoint.tensors))[-1].model
    except UnknownModel:
        return
    if setting := non_causal_setting(model_with_head):
        raise CheckpointError(
            f"{checkpoint.store.root}: by config.json ({setting}) every token of this {type(model_with_head).__name__}"
            " attends to later tokens, so its perplexity is meaningless; evaluate it on the task that it was trained"
            " for"
        )


def non_causal_setting(model: Any) -> str:
    """Return the setting of a model's config that lets tokens attend to later tokens; "" if there is none."""
    config = model.config
    # Modules of GPT-NeoX ignore `is_decoder`, so the config alone would be misleading.
    encoders = (vars(module).get("is_decoder") is False for module in model.modules())
    if getattr(config, "is_decoder", None) is False and any(encoders):
        return "is_decoder is false"
    # XLM
    if getattr(config, "causal", None) is False:
        return "causal is false"
    # XLNet
    if getattr(config, "attn_type", None) == "bi":
        return 'attn_type is "bi"'
    # In PaliGemma, the value True concerns images and prompts only.
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    is_encoder = bidirectional == "all" or (bidirectional is True and config.model_type == "gemma3_text")
    return "use_bidirectional_attention" if is_encoder else ""

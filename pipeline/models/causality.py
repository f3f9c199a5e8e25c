"""Whether a model predicts a token from those before it alone: of an encoder, which sees the token itself, a perplexity means nothing.

transformers opens encoders as causal models, too, and only logs that they are none (BERT and its kin, XLM, XLNet, EmbeddingGemma).
"""

from typing import Any

from pipeline.checkpoints.meta_model import UnknownModel, meta_models_of
from pipeline.errors import CheckpointError
from pipeline.models.stored_model import Model


def require_causal(model: Model, trusted: bool = False) -> None:
    """Raise CheckpointError if positions of the model attend to those that follow; nothing is said of code that a model brings."""
    checkpoint = model.checkpoint
    if (trusted and "auto_map" in checkpoint.config) or not checkpoint.files:
        return
    try:
        measured = meta_models_of(checkpoint.config, checkpoint.store.root, len(checkpoint.tensors))[-1].model
    except UnknownModel:
        return
    if setting := sees_ahead(measured):
        raise CheckpointError(
            f"{checkpoint.store.root}: by config.json ({setting}) every token of this {type(measured).__name__} sees those that follow"
            " it, so what it predicts of them is no perplexity; measure it by the task that it was made for"
        )


def sees_ahead(model: Any) -> str:
    """What of a model's config lets each token see those that follow it; "" if nothing does."""
    config = model.config
    encoders = (vars(module).get("is_decoder") is False for module in model.modules())  # GPT-NeoX has none that asks
    if getattr(config, "is_decoder", None) is False and any(encoders):
        return "is_decoder is false"
    if getattr(config, "causal", None) is False:  # XLM
        return "causal is false"
    if getattr(config, "attn_type", None) == "bi":  # XLNet
        return 'attn_type is "bi"'
    both = getattr(config, "use_bidirectional_attention", None)  # PaliGemma's is of pictures and what is asked of them
    return (
        "use_bidirectional_attention" if both == "all" or (both is True and config.model_type == "gemma3_text") else ""
    )

"""Check that a family of models can run in blocks: a twin of the model, random and narrow, runs whole and in blocks.

In some families something else than hidden states travels between layers: keys and values that later layers share, a
residual of the first layer, inputs for each layer. Such a model would give wrong results in blocks, without an error.
The twin has the depth, the kinds of layers and the blocks of the model, but its matrices are narrow, so that the
comparison takes seconds. Logits and gradients at all boundaries must be equal to the last bit.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.blocks.block import Block
from pipeline.blocks.layered_model import LayeredModel
from pipeline.blocks.skeleton import empty_model, set_parameter
from pipeline.errors import BlocksUnsupported, SwscError, first_line

# Tokens and vocabulary of the comparison, heads and sides of the narrow matrices, and experts of each layer.
_TOKENS, _VOCABULARY, _HEADS, _SIDE, _EXPERTS = 24, 256, 2, 64, 4
# Names in configs of the sizes of feed-forward layers and experts.
_SIDES = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
# Standard deviation of the random weights: enough for every layer to matter.
_SCALE = 0.2


def require_blocks(kind: Any, config: Any, blocks: Sequence[Block], location: str) -> int:
    """Return the length of the tuple that the layers return, see `LayeredModel`.

    Args:
        kind: class of the model.
        config: its config.
        blocks: the partition that is going to be used.
        location: of the model, for messages.

    Raises:
        BlocksUnsupported: the results differ, or the twin cannot be built.
    """
    try:
        twin = _Twin(empty_model(kind, narrow_config(config), torch.float32, "cpu"))
        whole = _Run(twin, blocks)
        logits, gradients = whole.at_once()
        streamed_logits, streamed_gradients = whole.in_blocks()
    except SwscError:
        raise
    except Exception as error:  # the code of a family may fail in any way on a narrow config
        raise BlocksUnsupported(
            f"{location}: {kind.__name__} cannot run in blocks of layers: its narrow twin fails ({first_line(error)});"
            " use workers that hold the whole model"
        ) from None
    pairs = zip((logits, logits, *gradients), (*streamed_logits, *streamed_gradients), strict=True)
    if not all(torch.equal(whole_values, streamed) for whole_values, streamed in pairs):
        raise BlocksUnsupported(
            f"{location}: {kind.__name__} cannot run in blocks of layers: more than hidden states travels between its"
            " layers; use workers that hold the whole model"
        )
    return whole.tuple_length


def narrow_config(config: Any) -> Any:
    """A config of the same depth and kinds of layers with few, narrow matrices.

    The number of values of a head stays, because rotary sections divide it.
    """
    narrow = copy.deepcopy(config)
    text = narrow.get_text_config()
    heads = text.num_attention_heads
    width = (getattr(text, "head_dim", None) or text.hidden_size // heads) * _HEADS
    shared = (getattr(text, "num_key_value_heads", None) or heads) < heads
    sizes = {
        "vocab_size": _VOCABULARY,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1 if shared else _HEADS,
        "num_kv_heads": 1 if shared else _HEADS,
        **dict.fromkeys(_SIDES, _SIDE),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
        **dict.fromkeys(("n_group", "topk_group"), 1),
        "pad_token_id": None,
    }
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    return narrow


class _Twin:
    """Parameters with random values that depend on their names only (`layered_model.Parameters`)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load(self, parameters: Iterable[str]) -> None:
        for name in parameters:
            tensor = self.model.get_parameter_or_buffer(name)
            if tensor.is_meta:
                generator = torch.Generator().manual_seed(sum(name.encode()))
                values = torch.randn(tensor.shape, generator=generator).mul_(_SCALE).to(tensor.dtype)
                set_parameter(self.model, name, values)

    def release(self, parameters: Iterable[str]) -> None:
        for name in parameters:
            set_parameter(self.model, name, self.model.get_parameter_or_buffer(name).to("meta"))


class _Run:
    """Forward and backward passes of a twin, at once and in blocks."""

    def __init__(self, twin: _Twin, blocks: Sequence[Block]) -> None:
        self._twin, self._blocks = twin, blocks
        self._ids = torch.arange(1, _TOKENS + 1)[None]
        self.tuple_length = 0

    def at_once(self) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the gradients at the boundaries between blocks."""
        layered, n_layers = LayeredModel(self._twin), self._blocks[0].n_layers
        layers = [self._twin.model.get_submodule(path) for path in layered.layers]
        boundaries: list[Tensor] = []

        def watch(hidden: Tensor) -> None:
            boundaries.append(hidden.requires_grad_() if hidden.is_leaf else hidden)
            hidden.retain_grad()

        def watch_input(_layer: nn.Module, arguments: Any, named: Any) -> None:
            watch(arguments[0] if arguments else named["hidden_states"])

        def watch_output(_layer: nn.Module, _arguments: Any, output: Any) -> None:
            self.tuple_length = len(output) if isinstance(output, tuple) else 0
            if n_layers in stops:
                watch(output[0] if isinstance(output, tuple) else output)

        stops = {block.stop for block in self._blocks[:-1]}
        handles = [
            layers[stop].register_forward_pre_hook(watch_input, with_kwargs=True) for stop in stops if stop < n_layers
        ]
        handles.append(layers[-1].register_forward_hook(watch_output))
        logits = layered.run(Block(0, n_layers, n_layers), self._ids)
        _backward(logits)
        for handle in handles:
            handle.remove()
        layered.close()
        return logits.detach(), [_gradient(hidden) for hidden in boundaries]

    def in_blocks(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same, block by block: the forward pass of each, and its repetition with the backward pass.

        The logits are computed twice: by the head alone, and in the backward pass of the last block.
        """
        layered = LayeredModel(self._twin, self.tuple_length)
        inputs: list[Tensor | None] = [None]
        others: Tensor | None = None
        with torch.no_grad():
            for block in self._blocks[:-1]:
                inputs.append(layered.run(block, self._ids, inputs[-1]))
                # Other tokens pass each block afterwards: a value that stays in the model must not help later blocks.
                others = layered.run(block, self._ids.flip(1), others)
            layers, head = self._blocks[-1].without_head, self._blocks[-1].head
            last = layered.run(layers, self._ids, inputs[-1])
            layered.run(layers, self._ids.flip(1), others)
            logits = [layered.run(head, self._ids, last)]
        gradients: list[Tensor] = []
        for block, hidden in reversed(list(zip(self._blocks, inputs, strict=True))):
            if hidden is None and gradients:
                break
            leaf = None if hidden is None else hidden.clone().requires_grad_()
            output = layered.run(block, self._ids, leaf)
            if block.is_last:
                logits.append(output.detach())
            if leaf is None:
                break
            _backward(output) if block.is_last else output.backward(gradients[0])
            gradients.insert(0, _gradient(leaf))
        layered.close()
        return logits, gradients


def _backward(logits: Tensor) -> None:
    if logits.requires_grad:
        logits.float().square().sum().backward()


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad

"""Runs one block of a model: the model's own forward method, with all layers outside the block passing their input on.

Masks, rotary tables, positions and the kinds of attention are computed and passed by the model's own code, so nothing
is captured and replayed. The hidden states of the block's first layer are set from outside, and the run stops after its
last layer. `twin.py` checks that this gives what the whole model gives.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.blocks.block import Block
from pipeline.errors import BlocksUnsupported
from pipeline.models.loading import forward


class _Stop(Exception):
    """Ends a forward pass after the last layer of a block."""


class Parameters(Protocol):
    """A model whose parameters are loaded and released by name (`Skeleton`)."""

    model: Any

    def load(self, parameters: Iterable[str]) -> None:
        """Load parameters and stored buffers; those that are loaded stay as they are."""

    def release(self, parameters: Iterable[str]) -> None:
        """Free the memory of parameters and stored buffers."""


class LayeredModel:
    """A model that loads and runs blocks. It holds the parameters of one block at a time.

    Attributes:
        layers: paths of the decoder layers in the model.
    """

    def __init__(self, skeleton: Parameters, tuple_length: int = 0) -> None:
        """Prepare a model.

        Args:
            skeleton: the model without parameters.
            tuple_length: length of the tuple that a decoder layer returns; 0 if it returns hidden states alone.
        """
        self.skeleton, self.model = skeleton, skeleton.model
        self._tuple_length = tuple_length
        self.layers = decoder_layers(self.model)
        self._modules = [self.model.get_submodule(path) for path in self.layers]
        self._parameters = [
            list(module.state_dict(prefix=f"{path}.", keep_vars=True))
            for path, module in zip(self.layers, self._modules, strict=True)
        ]
        self._ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        paths = {module: path for path, module in self.model.named_modules()}
        self._paths = [paths[module] for module in self._ends]
        self._block: Block | None = None
        self._hooks = []
        inner = {module for layer in self._modules for module in layer.modules()}
        for path, module in self.model.named_modules():
            if module not in inner and own_parameters(path, module):
                self._hooks.append(module.register_forward_pre_hook(self._loader(path)))

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def parameters_of(self, block: Block) -> list[str]:
        """Names of the parameters and stored buffers of a block's layers."""
        return [name for layer in block.layers for name in self._parameters[layer]]

    def weights_of(self, block: Block) -> int:
        """Number of weights of a block's layers."""
        return sum(self.model.get_parameter_or_buffer(name).numel() for name in self.parameters_of(block))

    @property
    def end_parameters(self) -> list[list[str]]:
        """Names of the parameters of the input embedding and of the head."""
        return [own_parameters(path, module) for path, module in zip(self._paths, self._ends, strict=True)]

    def load(self, block: Block) -> None:
        """Load the parameters of the block's layers, and release those of the block before."""
        if block == self._block:
            return
        self._release(block.layers)
        if block.is_first:  # before it runs, because some models ask for the device of its weight
            self.skeleton.load(self.end_parameters[0])
        if block.is_last:
            self.skeleton.load(self.end_parameters[1])
        self.skeleton.load(self.parameters_of(block))
        self._block = block

    def release(self) -> None:
        """Release the parameters of the block that is loaded."""
        self._release(range(0))

    def _release(self, kept: range) -> None:
        """Release the input embedding, the head, and the layers of the present block that are not among `kept`."""
        before, self._block = self._block, None
        for layer in before.layers if before else ():
            if layer not in kept:
                self.skeleton.release(self._parameters[layer])
        for names in self.end_parameters:
            self.skeleton.release(names)

    def run(self, block: Block, ids: Tensor, hidden: Tensor | None = None, **model_args: Any) -> Tensor:
        """The hidden states after a block [batch, length, width], or the logits after the last one.

        Args:
            block: the block, which is loaded if it is not.
            ids: int64 [batch, length].
            hidden: hidden states before the block; None for the first one.
            model_args: as for `forward`.
        """
        self.load(block)
        with ExitStack() as stack:
            stack.enter_context(self._passing(block))
            output: list[Tensor] = []
            if not block.is_first:
                assert hidden is not None
                stack.enter_context(_replaced_input(self._modules[min(block.start, len(self._modules) - 1)], hidden))
                stack.enter_context(_zero_embedding(self._ends[0], ids.device))
            if not block.is_last:
                stack.enter_context(_stop_after(self._modules[max(block.stop, 1) - 1], output))
            try:
                logits: Tensor = forward(self.model, ids, **model_args).logits
                return logits
            except _Stop:
                return output[0]

    def _loader(self, path: str) -> Callable[..., None]:
        """Hook that loads the parameters of a module outside the layers when the module first runs."""
        module = self.model.get_submodule(path)

        def load(_module: nn.Module, _arguments: Any) -> None:
            self.skeleton.load(own_parameters(path, module))

        return load

    @contextmanager
    def _passing(self, block: Block) -> Iterator[None]:
        outside = [module for layer, module in enumerate(self._modules) if layer not in block.layers]
        for module in outside:
            module.forward = self._pass_on
        try:
            yield
        finally:
            for module in outside:
                del module.forward

    def _pass_on(self, hidden_states: Any = None, *_arguments: Any, **_named: Any) -> Any:
        """The forward method of a layer outside the block: returns its first argument."""
        return (hidden_states,) + (None,) * (self._tuple_length - 1) if self._tuple_length else hidden_states


def decoder_layers(model: Any) -> list[str]:
    """Paths of the decoder layers of a causal LM.

    Raises:
        BlocksUnsupported: the model has no list of layers that transformers marks as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    count = model.config.get_text_config().num_hidden_layers
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
        and not _belongs_to_encoder(path)
    ]
    if len(lists) != 1:
        raise BlocksUnsupported(f"{type(model).__name__} has {len(lists)} lists of {count} decoder layers")
    return [f"{lists[0]}.{layer}" for layer in range(count)]


def _belongs_to_encoder(path: str) -> bool:
    """Whether a module belongs to an encoder of images or sound, or to a head that predicts several tokens."""
    return any(word in path for word in ("vision", "visual", "audio", "image", "mtp"))


def own_parameters(path: str, module: nn.Module) -> list[str]:
    """Names of the parameters of a module itself."""
    return [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]


@contextmanager
def _replaced_input(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    def replace(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, "hidden_states": hidden}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stop_after(layer: nn.Module, output: list[Tensor]) -> Iterator[None]:
    def stop(_module: nn.Module, _arguments: Any, result: Any) -> None:
        output.append(result[0] if isinstance(result, tuple) else result)
        raise _Stop

    handle = layer.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _zero_embedding(embedding: nn.Module, device: torch.device) -> Iterator[None]:
    """Give an input embedding on the meta device zeros that take no memory; later blocks do not use its output."""
    weight = embedding.get_parameter("weight")
    if not weight.is_meta:
        yield
        return
    zero = torch.zeros((), dtype=weight.dtype, device=device)
    embedding._parameters["weight"] = nn.Parameter(zero.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        embedding._parameters["weight"] = weight

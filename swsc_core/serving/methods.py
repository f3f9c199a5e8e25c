"""Quantization methods of single layers, shared by vLLM and SGLang, whose interfaces have the same origin.

Neither engine is imported here; vllm.py and sglang.py add the engines' base classes. A method registers empty
parameters under the stored names of the parts. These pass what is loaded to a `ShardLoader`, and a module that computes
replaces them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.serving.modules import ServedEmbedding, ServedLinear
from swsc_core.serving.shard_slices import EmbeddingShard, LinearShard
from swsc_core.serving.weight_loader import CheckpointTensor, ShardLoader


class ServedMethod:
    """Creates, loads and applies the weights of a linear layer.

    Args:
        sources: the tensors of the checkpoint that the layer fuses, in order.
    """

    def __init__(self, sources: Sequence[CheckpointTensor]) -> None:
        self.sources = sources

    def rank_and_size(self, layer: nn.Module) -> tuple[int, int]:
        """Rank of this process in the layer's tensor parallel group, and the group's size."""
        raise NotImplementedError

    def loader(self, layer: nn.Module, width: int, sizes: Sequence[int], dtype: torch.dtype) -> ShardLoader:
        """The loader of the rank's slices.

        Args:
            layer: the engine's layer.
            width: input features of the layer on this rank.
            sizes: output features on this rank, one number per matrix that the layer fuses.
            dtype: dtype of floating point values in memory.

        Raises:
            ValueError: the layer's slices do not correspond to the tensors of the checkpoint.
        """
        if len(self.sources) not in (1, len(sizes)):
            names = ", ".join(source.name for source in self.sources)
            raise ValueError(f"{names}: {len(sizes)} slices of these are not served compressed; `swsc restore` first")
        sizes_of_sources = [tuple(sizes)] if len(self.sources) == 1 else [(size,) for size in sizes]
        sources = [replace(source, sizes=s) for source, s in zip(self.sources, sizes_of_sources, strict=True)]
        return ShardLoader(sources, LinearShard(width, *self.rank_and_size(layer)), dtype)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register empty parameters under the names of the parts; the engine's interface defines the arguments."""
        loader = self.loader(layer, input_size_per_partition, output_partition_sizes, params_dtype)
        layer.swsc_loader = loader  # type: ignore[assignment]
        for part, dtype in loader.parts().items():
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = _weight_loader(loader, part)  # type: ignore[attr-defined]
            piece, name = part.rpartition(".")[::2]
            _parameter_holder(layer, piece).register_parameter(name, empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the empty parameters by the module that computes.

        Raises:
            ValueError: parts are missing; names them.
        """
        loader = layer.swsc_loader
        assert isinstance(loader, ShardLoader)
        for name in {part.partition(".")[0] for part in loader.parts()}:
            delattr(layer, name)
        del layer.swsc_loader
        layer.swsc = self.served_module(layer, loader)

    def served_module(self, layer: nn.Module, loader: ShardLoader) -> nn.Module:
        """The module that computes with the rank's slices."""
        return ServedLinear(loader.slices())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        module: Any = layer.swsc
        y: Tensor = module(x, bias)
        return y


class ServedEmbeddingMethod(ServedMethod):
    """Method of an embedding or a head, whose `shard_indices` state the rows of the rank."""

    def loader(self, layer: nn.Module, width: int, sizes: Sequence[int], dtype: torch.dtype) -> ShardLoader:
        indices: Any = layer.shard_indices
        first, last = indices.org_vocab_start_index, indices.org_vocab_end_index
        if first == last or indices.num_added_elements:
            raise ValueError(
                f"{self.sources[0].name}: a rank without rows, or added vocabulary; use fewer ranks and no added"
                " vocabulary, or `swsc restore` first"
            )
        return ShardLoader(self.sources, EmbeddingShard(first, last), dtype)

    def served_module(self, layer: nn.Module, loader: ShardLoader) -> nn.Module:
        (matrix,) = loader.slices().matrices
        assert isinstance(matrix, CompressedMatrix)
        return ServedEmbedding(matrix, int(layer.num_embeddings_per_partition), loader.dtype)  # type: ignore[arg-type]

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Token ids int64 [...], counted within the rank's rows -> [..., n]."""
        module: Any = layer.swsc
        rows: Tensor = module.embedding(ids)
        return rows


def _weight_loader(loader: ShardLoader, part: str) -> Callable[..., None]:
    """The function that the engine calls with each stored tensor of a part."""

    def load(parameter: nn.Parameter, tensor: Tensor, shard_id: str | int | None = None) -> None:
        loader.take(part, tensor, shard_id, parameter.device)

    return load


def _parameter_holder(layer: nn.Module, piece: str) -> nn.Module:
    """The module that holds the parameters of a piece of a fused matrix: a child of that name, as in the checkpoint."""
    if not piece:
        return layer
    if piece not in layer._modules:
        layer.add_module(piece, nn.Module())
    return layer.get_submodule(piece)

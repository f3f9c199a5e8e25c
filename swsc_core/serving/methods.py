"""What the quantization interfaces of vLLM and SGLang, which have one origin, want of a format: here, a method for a layer.

Neither engine is imported here. Theirs are the base classes and the door (vllm.py, sglang.py), ours is what is done: empty
parameters under the names of the parts, which hand what is loaded to a `Loading`, and in their place a module afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.serving.modules import ServedEmbedding, ServedLinear
from swsc_core.serving.shard_slices import EmbeddingShard, LinearShard
from swsc_core.serving.weight_loader import CheckpointTensor, Loading


class ServedMethod:
    """Creates, loads and applies the weights of a layer of `sources`."""

    def __init__(self, sources: Sequence[CheckpointTensor]) -> None:
        self.sources = sources

    def ranks_of(self, layer: nn.Module) -> tuple[int, int]:
        """Rank of this process in the layer's tensor parallel group, and the group's size."""
        raise NotImplementedError

    def shard(
        self, layer: nn.Module, width: int, sizes: Sequence[int]
    ) -> tuple[Sequence[CheckpointTensor], LinearShard | EmbeddingShard]:
        """The sources with the sizes of the rank's slices, and which rows and columns these are."""
        if len(self.sources) not in (1, len(sizes)):
            names = ", ".join(source.name for source in self.sources)
            raise ValueError(f"{names}: {len(sizes)} slices of these are not served compressed; `swsc restore` first")
        cut = [tuple(sizes)] if len(self.sources) == 1 else [(size,) for size in sizes]
        sources = [replace(source, sizes=own) for source, own in zip(self.sources, cut, strict=True)]
        return sources, LinearShard(width, *self.ranks_of(layer))

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: Sequence[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Empty parameters under the names of the parts; what is loaded into them waits in `layer.swsc_loading`."""
        sources, shard = self.shard(layer, input_size_per_partition, output_partition_sizes)
        layer.swsc_loading = loading = Loading(sources, shard, params_dtype)  # type: ignore[assignment]
        for part, dtype in loading.parts().items():
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = _loader(loading, part)  # type: ignore[attr-defined]
            piece = part.rpartition(".")[0]
            _holder(layer, piece).register_parameter(part.removeprefix(f"{piece}."), empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The module that computes takes the place of the empty parameters; ValueError, naming what has not come."""
        loading = layer.swsc_loading
        assert isinstance(loading, Loading)
        for name in {part.partition(".")[0] for part in loading.parts()}:
            delattr(layer, name)
        del layer.swsc_loading
        layer.swsc = self.finished(layer, loading)

    def finished(self, layer: nn.Module, loading: Loading) -> nn.Module:
        """The module that computes with the rank's slices."""
        return ServedLinear(*loading.cuts())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        return layer.swsc(x, bias)  # type: ignore[operator]


class ServedEmbeddingMethod(ServedMethod):
    """Of an embedding or a head, whose rows are dealt out as its `shard_indices` say."""

    def shard(
        self, layer: nn.Module, width: int, sizes: Sequence[int]
    ) -> tuple[Sequence[CheckpointTensor], LinearShard | EmbeddingShard]:
        indices: Any = layer.shard_indices
        first, last = indices.org_vocab_start_index, indices.org_vocab_end_index
        if first == last or indices.num_added_elements:
            raise ValueError(
                f"{self.sources[0].name}: use fewer ranks, and no added vocabulary, or `swsc restore` first"
            )
        return self.sources, EmbeddingShard(first, last)

    def finished(self, layer: nn.Module, loading: Loading) -> nn.Module:
        (cut,), _ = loading.cuts()
        assert isinstance(cut, CompressedMatrix)
        return ServedEmbedding(cut, int(layer.num_embeddings_per_partition), loading.dtype)  # type: ignore[arg-type]

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids int64 [...], of the rank's own rows -> [..., n]."""
        return layer.swsc.embedding(ids)  # type: ignore[operator, union-attr]


def _loader(loading: Loading, part: str) -> Callable[..., None]:
    def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        loading.take(part, tensor, shard, parameter.device)

    return load


def _holder(layer: nn.Module, piece: str) -> nn.Module:
    """What holds the parameters of a piece of a joined matrix: a module of its name in the layer, as in the checkpoint."""
    if not piece:
        return layer
    if piece not in layer._modules:
        layer.add_module(piece, nn.Module())
    return layer.get_submodule(piece)

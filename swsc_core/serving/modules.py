"""Modules that compute in place of an engine's weight: a rank's slices of a linear layer, an embedding or a head."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.registry import can_fuse, fuse
from swsc_core.layers.linear import SwscEmbedding, SwscLinear
from swsc_core.serving.shard_slices import RankSlices


class ServedLinear(nn.Module):
    """y = x Wᵀ + b, where W consists of a rank's slices, each compressed or dense.

    Neighbouring slices that can be fused, as those of whole output channels can, are computed by one product.
    """

    def __init__(self, slices: RankSlices) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(matrix) for matrix in _fuse_neighbours(slices.matrices))
        self.order: Tensor | None
        self.register_buffer("order", slices.order, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        outputs = [layer(x) for layer in self.layers]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        y = y if self.order is None else y.index_select(-1, self.order)
        return y if bias is None else y + bias


class ServedEmbedding(nn.Module):
    """A rank's rows of an embedding, and the head that shares them.

    Args:
        matrix: the rank's rows [m, n].
        rows: number of logits that the engine expects; those after the first m are zero.
        dtype: dtype of the embedded tokens.
    """

    def __init__(self, matrix: CompressedMatrix, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.embedding = _linear(matrix), SwscEmbedding(matrix.entry, dtype=dtype, device="meta")
        self.embedding.load_state_dict(matrix.tensors, assign=True)
        self.padding = rows - matrix.entry.shape[0]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> logits [..., rows]."""
        y = nn.functional.pad(self.head(x), (0, self.padding))
        return y if bias is None else y + bias


def _fuse_neighbours(matrices: Sequence[CompressedMatrix | Tensor]) -> Iterator[CompressedMatrix | Tensor]:
    """The matrices, with runs of neighbours fused where their methods allow it."""
    run: list[CompressedMatrix] = []
    for matrix in matrices:
        if not isinstance(matrix, Tensor) and can_fuse([member.entry for member in [*run, matrix]]):
            run.append(matrix)
            continue
        if run:
            yield fuse(run)
        run = []
        if isinstance(matrix, Tensor) or not can_fuse([matrix.entry]):
            yield matrix
        else:
            run = [matrix]
    if run:
        yield fuse(run)


def _linear(matrix: CompressedMatrix | Tensor) -> nn.Module:
    if isinstance(matrix, Tensor):
        layer: nn.Module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        state = {"weight": matrix}
    else:
        layer, state = SwscLinear(matrix.entry, device="meta"), matrix.tensors
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)

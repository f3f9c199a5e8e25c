"""What computes in the place of an engine's weight: a rank's slices of a linear layer, of an embedding, of a head."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.registry import can_fuse, fuse
from swsc_core.layers.linear import SwscEmbedding, SwscLinear


class ServedLinear(nn.Module):
    """y = x Wᵀ + b of a rank's slices one above the other, each compressed or dense; whole output channels by one product.

    Args:
        order: which of the slices' rows, counted through, each output is; None if they are in order.
    """

    def __init__(self, slices: Sequence[CompressedMatrix | Tensor], order: Tensor | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(cut) for cut in _fused(slices))
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        outputs = [layer(x) for layer in self.layers]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        y = y if self.order is None else y.index_select(-1, self.order)
        return y if bias is None else y + bias


class ServedEmbedding(nn.Module):
    """A rank's rows of an embedding, filled up to `rows` with zeros, and the head that shares them."""

    def __init__(self, cut: CompressedMatrix, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head, self.embedding = _linear(cut), SwscEmbedding(cut.entry, dtype=dtype, device="meta")
        self.embedding.load_state_dict(cut.tensors, assign=True)
        self.missing = rows - cut.entry.shape[0]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> logits [..., rows]."""
        y = nn.functional.pad(self.head(x), (0, self.missing))
        return y if bias is None else y + bias


def _fused(slices: Sequence[CompressedMatrix | Tensor]) -> Iterator[CompressedMatrix | Tensor]:
    """Neighbours that can be one matrix as one."""
    run: list[CompressedMatrix] = []
    for cut in slices:
        if not isinstance(cut, Tensor) and can_fuse([one.entry for one in [*run, cut]]):
            run.append(cut)
            continue
        if run:
            yield fuse(run)
        run = []
        if isinstance(cut, Tensor) or not can_fuse([cut.entry]):
            yield cut
        else:
            run = [cut]
    if run:
        yield fuse(run)


def _linear(cut: CompressedMatrix | Tensor) -> nn.Module:
    if isinstance(cut, Tensor):
        layer: nn.Module = nn.Linear(cut.shape[1], cut.shape[0], bias=False, device="meta")
        state = {"weight": cut}
    else:
        layer, state = SwscLinear(cut.entry, device="meta"), cut.tensors
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)

"""Layers whose weight stays compressed: the parts lie in memory as they are stored, and the forward pass works from them.

A part is a parameter under its stored name (`weight`, `labels`, `left`, …), so that a state dict is what the files hold.
Nothing requires a gradient unless it is asked for: `layer.left.requires_grad_()` fine-tunes the factors, say. These are no
`nn.Linear` on purpose: code that reaches for `.weight` as the dense matrix would be silently wrong.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swsc_core.compressed.codec import decode, encode
from swsc_core.compressed.compressed_matrix import CompressedMatrix
from swsc_core.compressed.entry import Entry
from swsc_core.compressed.registry import matrix_of
from swsc_core.method.metric import Metric
from swsc_core.method.spec import Spec
from swsc_core.storage.location import row_blocks_of
from swsc_core.storage.row_blocks import fuse_rows, require_partition, row_permutation


def _hold(layer: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    """Parameters of no size all lie at address 0, which tools that look for tied ones take for one and the same: they are buffers."""
    if tensor.numel():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad))
    else:
        layer.register_buffer(name, tensor)


class CompressedWeight(nn.Module):
    """The parts of one matrix [m, n], empty until they are loaded.

    Args:
        entry: that of `encode`.
        dtype: of the parts that are floating point values; torch's default if None.

    Attributes:
        tied: another layer works from the same parts.
    """

    def __init__(
        self, entry: Entry, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.entry, self.tied = entry, False
        self._part_names = tuple(entry.part_shapes())
        for part, (shape, is_float) in entry.part_shapes().items():
            kind = (dtype or torch.get_default_dtype()) if is_float else torch.uint8
            self._hold(part, torch.empty(shape, dtype=kind, device=device))

    def _hold(self, part: str, tensor: Tensor) -> None:
        """`tensor` as the part of that name."""
        wanted = getattr(self, part, tensor).requires_grad
        if part in self._parameters or part in self._buffers:
            delattr(self, part)
        _hold(self, part, tensor, wanted)

    @property
    def parts(self) -> dict[str, Tensor]:
        """part -> tensor."""
        return {part: getattr(self, part) for part in self._part_names}

    @property
    def dtype(self) -> torch.dtype:
        """That of the parts that are floating point values."""
        return next(part.dtype for part in self.parts.values() if part.is_floating_point())

    @property
    def matrix(self) -> CompressedMatrix:
        """The compressed matrix that the parts are."""
        return matrix_of(self.parts, self.entry)

    def dense_weight(self) -> Tensor:
        """W, [m, n], in the dtype that it had before it was compressed; ValueError if the parts are damaged."""
        with torch.no_grad():
            return decode(self.parts, self.entry)

    def extra_repr(self) -> str:
        shown = {key: value for key, value in self.entry.to_json().items() if key not in ("shape", "dtype", "method")}
        return ", ".join(f"{key}={value}" for key, value in shown.items() if value is not None)


class SwscLinear(CompressedWeight):
    """y = x Wᵀ + b by the compressed W, as its method multiplies (`CompressedMatrix.matmul`)."""

    def __init__(
        self,
        entry: Entry,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(entry, dtype, device)
        self.out_features, self.in_features = entry.shape
        kind = dtype or torch.get_default_dtype()
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=kind, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: Spec, *, metric: Metric | None = None, seed: int = 0) -> "SwscLinear":
        """Compress the weight of `linear`, which is not changed; ValueError as from `encode`."""
        encoded = encode(linear.weight.detach(), [spec], seed=seed, metric=metric)
        made = cls(encoded.entry, linear.bias is not None, linear.weight.dtype, "meta")
        parts = dict(encoded.tensors) | ({} if linear.bias is None else {"bias": linear.bias.detach().clone()})
        made.load_state_dict(parts, assign=True)
        return made

    def low_rank_error(self, rank: int) -> str | None:
        """Why the compensation cannot become higher by `rank`; None if it can."""
        if self.tied and self.entry.low_rank_error(0) is None:
            return "it is tied to another layer, which would change, too"
        return self.entry.low_rank_error(rank)

    def add_low_rank(self, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ · right to W, [r, m] and [r, n]: compensation of a rank higher by r, rounded to the dtype of its factors.

        Raises:
            ValueError: as `low_rank_error` says.
        """
        if why := self.low_rank_error(left.shape[0]):
            raise ValueError(why)
        added = {"left": left, "right": right}
        parts = {part: torch.cat([self.parts[part], more.to(self.parts[part])]) for part, more in added.items()}
        self._hold_low_rank(parts, self.entry.low_rank + left.shape[0])

    def drop_low_rank(self, rank: int) -> None:
        """Undo `add_low_rank` of that rank, to the bit."""
        kept = self.entry.low_rank - rank
        self._hold_low_rank({part: self.parts[part][:kept].clone() for part in ("left", "right")}, kept)

    def _hold_low_rank(self, parts: Mapping[str, Tensor], rank: int) -> None:
        self.entry = self.entry.with_low_rank(rank)
        for part, tensor in parts.items():
            self._hold(part, tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m]."""
        return self.matrix.matmul(x, self.bias)


class SwscJoined(nn.Module):
    """y = x Wᵀ + b of a matrix that joins several, some of them compressed: each is multiplied by itself, then rows are put in order.

    Args:
        pieces: name of a piece ("q", "k", …) -> its entry, which says which rows it is.
        rest: rows that are in no piece; their weight is dense.

    Raises:
        ValueError: pieces that overlap or leave rows out.
    """

    def __init__(
        self,
        pieces: Mapping[str, Entry],
        rest: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows = row_blocks_of(entry.location for entry in pieces.values())
        require_partition(rest, self.rows)
        for name, entry in pieces.items():
            self.add_module(name, SwscLinear(entry, dtype=dtype, device=device))
        self.out_features = rest + sum(rows.total for rows in self.rows)
        self.in_features = next(iter(pieces.values())).shape[1]
        kind = dtype or torch.get_default_dtype()
        _hold(self, "weight", torch.empty(rest, self.in_features, dtype=kind, device=device))
        # no buffer: models are made without memory, and what no file holds would stay so
        self._order = torch.tensor(row_permutation(self.out_features, self.rows), device="cpu")
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=kind, device=device)) if bias else None

    @property
    def pieces(self) -> dict[str, SwscLinear]:
        """name -> layer."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, SwscLinear)}

    @property
    def _rest(self) -> Tensor:
        return self.get_parameter("weight") if "weight" in self._parameters else self.get_buffer("weight")

    def dense_weight(self) -> Tensor:
        """W, [m, n], in the dtype of the rows that are in no piece; ValueError if a part is damaged."""
        with torch.no_grad():
            return fuse_rows(self._rest, self.rows, (layer.dense_weight() for layer in self.pieces.values()))

    def _order_on(self, device: torch.device) -> Tensor:
        """Where each row is found among those of the pieces, int64 [m]; copied once, not in every pass."""
        if self._order.device != device:
            with torch.inference_mode(False):  # a later pass may be one with gradients
                self._order = self._order.to(device)
        return self._order

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m]."""
        found = [layer(x) for layer in self.pieces.values()]
        y = torch.cat([*found, nn.functional.linear(x, self._rest.to(x.dtype)).to(found[0].dtype)], dim=-1)
        y = y.index_select(-1, self._order_on(x.device))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SwscEmbedding(CompressedWeight):
    """Rows of W by their indices, times `scale`, as the method restores rows (`CompressedMatrix.restore_rows`)."""

    def __init__(
        self,
        entry: Entry,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(entry, dtype, device)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = entry.shape

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., n], in the dtype of the parts."""
        rows = self.matrix.restore_rows(ids.reshape(-1)).to(self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim) * self.scale

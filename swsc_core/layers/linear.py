"""Layers whose weight stays compressed in memory and is used in that form by the forward pass.

A part is a parameter under its stored name (`weight`, `labels`, `left`, …), so that the state dict has the tensors of
the file. No part requires a gradient by default; `layer.left.requires_grad_()`, for example, fine-tunes a factor. The
layers are no subclass of `nn.Linear` on purpose: code that uses `.weight` as the dense matrix would be silently wrong.
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


def _register(layer: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    """Register a tensor as a parameter, or as a buffer if it is empty.

    All empty tensors have the address 0, so that tools that detect tied parameters would treat empty parameters as
    tied.
    """
    if tensor.numel():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad))
    else:
        layer.register_buffer(name, tensor)


class CompressedWeight(nn.Module):
    """The parts of one matrix [m, n], uninitialized until they are loaded.

    Args:
        entry: of the compressed matrix, as `encode` returns it.
        dtype: of the parts with floating point values; torch's default if None.
        device: of the parts; torch's default if None.

    Attributes:
        tied: another layer uses the same parts.
    """

    def __init__(
        self, entry: Entry, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.entry, self.tied = entry, False
        self._part_names = tuple(entry.part_shapes())
        for part, (shape, is_float) in entry.part_shapes().items():
            kind = (dtype or torch.get_default_dtype()) if is_float else torch.uint8
            self._set_part(part, torch.empty(shape, dtype=kind, device=device))

    def _set_part(self, part: str, tensor: Tensor) -> None:
        """Replace a part; whether it requires a gradient stays."""
        requires_grad = getattr(self, part, tensor).requires_grad
        if part in self._parameters or part in self._buffers:
            delattr(self, part)
        _register(self, part, tensor, requires_grad)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Part name -> stored tensor."""
        return {part: getattr(self, part) for part in self._part_names}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts with floating point values."""
        return next(part.dtype for part in self.parts.values() if part.is_floating_point())

    @property
    def matrix(self) -> CompressedMatrix:
        """The compressed matrix of the parts."""
        return matrix_of(self.parts, self.entry)

    def dense_weight(self) -> Tensor:
        """W, [m, n], in its dtype before compression.

        Raises:
            ValueError: a part is damaged.
        """
        with torch.no_grad():
            return decode(self.parts, self.entry)

    def extra_repr(self) -> str:
        shown = {key: value for key, value in self.entry.to_json().items() if key not in ("shape", "dtype", "method")}
        return ", ".join(f"{key}={value}" for key, value in shown.items() if value is not None)


class SwscLinear(CompressedWeight):
    """y = x Wᵀ + b with a compressed W, multiplied by its method (`CompressedMatrix.matmul`).

    Args:
        entry: of the compressed matrix.
        bias: whether the layer has a bias.
        dtype: of the bias and of the parts with floating point values; torch's default if None.
        device: of the parameters; torch's default if None.
    """

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
        """A layer with the compressed weight and the bias of `linear`, which is not changed.

        Args:
            spec: how to compress the weight.
            metric: cost of an error, for specs of metric "activations".
            seed: of the run.

        Raises:
            ValueError: the conditions of `encode`.
        """
        encoded = encode(linear.weight.detach(), [spec], seed=seed, metric=metric)
        layer = cls(encoded.entry, linear.bias is not None, linear.weight.dtype, "meta")
        parts = dict(encoded.tensors) | ({} if linear.bias is None else {"bias": linear.bias.detach().clone()})
        layer.load_state_dict(parts, assign=True)
        return layer

    def require_growing_rank(self, added: int) -> None:
        """Raise ValueError unless the rank of the compensation can grow by `added`."""
        self.entry.require_growing_rank(0 if self.tied else added)
        if self.tied:
            raise ValueError("it is tied to another layer, which would change as well")

    def add_low_rank(self, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ · right to W. The rank of the compensation grows by r.

        Args:
            left, right: [r, m] and [r, n]; rounded to the dtype of the stored factors.

        Raises:
            ValueError: the conditions of `require_growing_rank`.
        """
        self.require_growing_rank(left.shape[0])
        factors = {"left": left, "right": right}
        parts = {part: torch.cat([self.parts[part], factor.to(self.parts[part])]) for part, factor in factors.items()}
        self._set_low_rank(parts, self.entry.low_rank + left.shape[0])

    def drop_low_rank(self, rank: int) -> None:
        """Remove the last `rank` factors; undoes `add_low_rank` of that rank exactly."""
        remaining = self.entry.low_rank - rank
        self._set_low_rank({part: self.parts[part][:remaining].clone() for part in ("left", "right")}, remaining)

    def _set_low_rank(self, parts: Mapping[str, Tensor], rank: int) -> None:
        self.entry = self.entry.with_low_rank(rank)
        for part, tensor in parts.items():
            self._set_part(part, tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m]."""
        return self.matrix.matmul(x, self.bias)


class SwscJoined(nn.Module):
    """y = x Wᵀ + b for a fused matrix W of which some pieces are compressed.

    The outputs of all pieces are computed separately and permuted to the row order of W.

    Args:
        pieces: name of a compressed piece ("q", "k", …) -> its entry, whose location states its rows.
        remaining: number of rows that belong to no piece; their weight is dense.
        bias: whether the layer has a bias.
        dtype: of dense rows, the bias, and parts with floating point values; torch's default if None.
        device: of the parameters; torch's default if None.

    Raises:
        ValueError: pieces that overlap or leave rows out.
    """

    def __init__(
        self,
        pieces: Mapping[str, Entry],
        remaining: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows = row_blocks_of(entry.location for entry in pieces.values())
        require_partition(remaining, self.rows)
        for name, entry in pieces.items():
            self.add_module(name, SwscLinear(entry, dtype=dtype, device=device))
        self.out_features = remaining + sum(rows.total for rows in self.rows)
        self.in_features = next(iter(pieces.values())).shape[1]
        kind = dtype or torch.get_default_dtype()
        _register(self, "weight", torch.empty(remaining, self.in_features, dtype=kind, device=device))
        # Not a buffer: models are created on the meta device, and buffers that no file contains would stay there.
        self._order = torch.tensor(row_permutation(self.out_features, self.rows), device="cpu")
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=kind, device=device)) if bias else None

    @property
    def pieces(self) -> dict[str, SwscLinear]:
        """Name of a compressed piece -> its layer."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, SwscLinear)}

    @property
    def _remaining_weight(self) -> Tensor:
        """Dense weight of the rows of no piece, [remaining, n]."""
        return self.get_parameter("weight") if "weight" in self._parameters else self.get_buffer("weight")

    def dense_weight(self) -> Tensor:
        """W, [m, n], in the dtype of the dense rows.

        Raises:
            ValueError: a stored tensor is damaged.
        """
        with torch.no_grad():
            pieces = (layer.dense_weight() for layer in self.pieces.values())
            return fuse_rows(self._remaining_weight, self.rows, pieces)

    def _order_on(self, device: torch.device) -> Tensor:
        """Permutation of the concatenated outputs to the row order of W, int64 [m]; copied to the device once."""
        if self._order.device != device:
            # A tensor that is created in inference mode could not be used in a later pass with gradients.
            with torch.inference_mode(False):
                self._order = self._order.to(device)
        return self._order

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] -> [..., m]."""
        outputs = [layer(x) for layer in self.pieces.values()]
        dense_output = nn.functional.linear(x, self._remaining_weight.to(x.dtype)).to(outputs[0].dtype)
        y = torch.cat([*outputs, dense_output], dim=-1)
        y = y.index_select(-1, self._order_on(x.device))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class SwscEmbedding(CompressedWeight):
    """Rows of a compressed W by their indices, times `scale`, restored by its method (`CompressedMatrix.restore_rows`).

    Args:
        entry: of the compressed matrix.
        scale: factor of all embeddings.
        dtype: of the parts with floating point values; torch's default if None.
        device: of the parameters; torch's default if None.
    """

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
        """Embeddings [..., n] of the indices `ids`, int64 [...], in the dtype of the parts."""
        rows = self.matrix.restore_rows(ids.reshape(-1)).to(self.dtype)
        return rows.reshape(*ids.shape, self.embedding_dim) * self.scale

"""The stored tensors of one layer of an engine, from the first that comes to a module that computes with them.

An engine fuses what a checkpoint keeps apart (q, k and v; gate and up), and each of its ranks computes a slice. Tensors come in
any order and whole. As soon as a matrix is complete its slice is cut and the rest let go, so that a rank never holds more than
its slices and what it is just reading.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swsc_core.codec import matrix_of, part_shapes, require_parts
from swsc_core.fusing import can_fuse, fuse
from swsc_core.linear import SwscEmbedding, SwscLinear
from swsc_core.slicing import Stored, slice_stored

Range = tuple[int, int]
Place = Callable[["Source", tuple[int, int]], list[tuple[Range, Range]]]
_SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}  # what engines call the tensors of a fused layer, when not by number
REMEDY = "`swsc verify DIR` names the file"


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint: its name without ".weight", and what config.json says of it; nothing of a dense one."""

    name: str
    entry: Mapping[str, Any] | None
    sizes: tuple[int, ...] = ()  # rows of the rank's slices of it, where an engine names these

    @property
    def parts(self) -> dict[str, torch.dtype]:
        """part -> the dtype that it is likely stored in."""
        if self.entry is None:
            return {"weight": torch.get_default_dtype()}
        stored = getattr(torch, self.entry["dtype"])
        return {part: stored if is_float else torch.uint8 for part, (_, is_float) in part_shapes(self.entry).items()}


def linear_place(width: int, rank: int, ranks: int) -> Place:
    """Where the slices of a rank lie in the matrices of a linear layer that has `width` inputs on each.

    Heads that are fewer than ranks are repeated: then several ranks have the same rows.
    """

    def place(source: Source, shape: tuple[int, int]) -> list[tuple[Range, Range]]:
        m, n = shape
        mine = sum(source.sizes)
        several, across = m // mine, n // width
        if several * mine != m or across * width != n or (len(source.sizes) > 1 and several not in (1, ranks)):
            wanted = f"slices of {'+'.join(map(str, source.sizes))} rows and {width} columns"
            raise ValueError(f"{source.name}: a matrix of {m}×{n} does not divide into {wanted}; use fewer ranks")
        column = rank * across // ranks * width
        slices, start = [], 0
        for size in source.sizes:
            first = start * several + rank * several // ranks * size
            slices.append(((first, first + size), (column, column + width)))
            start += size
        return slices

    return place


class Loading:
    """Takes the tensors of `sources`; a rank's slices of each lie where `place` says."""

    def __init__(self, sources: Sequence[Source], place: Place, dtype: torch.dtype) -> None:
        self.sources, self.place, self.dtype = sources, place, dtype
        self._arrived: list[dict[str, Tensor]] = [{} for _ in sources]
        self._slices: dict[int, list[Stored | Tensor]] = {}

    def parts(self) -> dict[str, torch.dtype]:
        """Names of the tensors that come, as the engine sees them, with a dtype."""
        return {part: dtype for source in reversed(self.sources) for part, dtype in source.parts.items()}

    def take(self, part: str, tensor: Tensor, shard: str | int | None, device: torch.device) -> None:
        """A tensor has come; ValueError, naming it, if it does not belong there."""
        number = shard if isinstance(shard, int) else _SHARDS[shard]
        source, arrived = self.sources[number], self._arrived[number]
        if part not in source.parts:
            raise ValueError(f"{source.name}.{part}: config.json knows no such part; {REMEDY}")
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        arrived[part] = tensor.to(device, dtype, copy=True)  # the engine may use its buffer again
        if arrived.keys() == source.parts.keys():
            self._slices[number] = self._cut(source, arrived)
            arrived.clear()

    def _cut(self, source: Source, parts: dict[str, Tensor]) -> list[Stored | Tensor]:
        if source.entry is None:
            weight = parts["weight"]
            if weight.ndim != 2 or not weight.is_floating_point():
                raise ValueError(
                    f"{source.name}: {list(weight.shape)} is no dense matrix, and config.json has no entry"
                )
            return [weight[slice(*rows), slice(*columns)].clone() for rows, columns in self._places(source, weight)]
        _require_whole(source.name, parts, source.entry)
        return [self._slice(source, parts, *place) for place in self.place(source, tuple(source.entry["shape"]))]

    def _places(self, source: Source, weight: Tensor) -> list[tuple[Range, Range]]:
        return self.place(source, (weight.shape[0], weight.shape[1]))

    def _slice(self, source: Source, parts: dict[str, Tensor], rows: Range, columns: Range) -> Stored:
        assert source.entry is not None
        try:
            cut, entry = slice_stored(parts, source.entry, rows, columns)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}; use fewer ranks, or `swsc restore` first") from error
        return {part: tensor.clone() for part, tensor in cut.items()}, entry  # a view would keep all of it

    def slices(self) -> list[Stored | Tensor]:
        """The rank's slices, in the order of the rows; ValueError, naming what has not come."""
        for number, source in enumerate(self.sources):
            if number not in self._slices:
                missing = ", ".join(
                    f"{source.name}.{part}" for part in source.parts if part not in self._arrived[number]
                )
                raise ValueError(f"not in the checkpoint: {missing}; {REMEDY}")
        return [cut for number in range(len(self.sources)) for cut in self._slices[number]]


def _require_whole(name: str, parts: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the tensor, unless `parts` are what `entry` says, labels in range."""
    try:
        require_parts(parts, entry)
    except ValueError as error:
        raise ValueError(f"{name}.{error}; {REMEDY}") from error
    try:
        if entry["method"] == "swsc":
            matrix_of(parts, entry).require_labels()
    except ValueError as error:
        raise ValueError(f"{name}.labels: {error}; {REMEDY}") from error


class ServedLinear(nn.Module):
    """y = x Wᵀ + b of a rank's slices one above the other, each compressed or dense; whole output channels by one product."""

    def __init__(self, slices: Sequence[Stored | Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear(cut) for cut in _fused(slices))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        outputs = [layer(x) for layer in self.layers]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


class ServedEmbedding(nn.Module):
    """A rank's rows of an embedding, filled up to `rows` with zeros, and the head that shares them."""

    def __init__(self, cut: Stored, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        parts, entry = cut
        self.head, self.embedding = _linear(cut), SwscEmbedding(entry, dtype=dtype, device="meta")
        self.embedding.load_state_dict(parts, assign=True)
        self.missing = rows - entry["shape"][0]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> logits [..., rows]."""
        y = nn.functional.pad(self.head(x), (0, self.missing))
        return y if bias is None else y + bias


def _fused(slices: Sequence[Stored | Tensor]) -> Iterator[Stored | Tensor]:
    """Neighbours that can be one matrix as one."""
    run: list[Stored] = []
    for cut in slices:
        if not isinstance(cut, Tensor) and can_fuse([entry for _, entry in [*run, cut]]):
            run.append(cut)
            continue
        if run:
            yield fuse(run)
        run = []
        if isinstance(cut, Tensor) or not can_fuse([cut[1]]):
            yield cut
        else:
            run = [cut]
    if run:
        yield fuse(run)


def _linear(cut: Stored | Tensor) -> nn.Module:
    if isinstance(cut, Tensor):
        layer: nn.Module = nn.Linear(cut.shape[1], cut.shape[0], bias=False, device="meta")
        state = {"weight": cut}
    else:
        state, entry = cut
        layer = SwscLinear(entry, device="meta")
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)

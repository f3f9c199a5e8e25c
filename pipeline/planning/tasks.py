"""The tasks of a plan, each of which writes one file of tensors.

A file holds at most `FILE_BYTES` of tensors, counted before compression: layers and source files that are larger are
cut. Tasks are therefore alike, workers hold little at a time, and the loss of a worker costs little.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.weight_files import tensor_files
from pipeline.models.matrices import FusedTensor, fused_tensors
from swsc_core.method.spec import Spec

FILE_BYTES = 2 << 30

T = TypeVar("T")
# A matrix, and candidates for its compression.
Planned = tuple[MatrixInfo, tuple[Spec, ...]]


@dataclass(frozen=True)
class LayerTask:
    """Compress selected matrices of one layer into one file, and write the remaining rows of fused tensors.

    Attributes:
        fused: the fused tensors of which `items` contains the last matrix; in the dense form it contains all.
    """

    layer: str
    file: str
    items: tuple[Planned, ...]
    fused: tuple[FusedTensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info, _ in self.items)


@dataclass(frozen=True)
class CopyTask:
    """Stream tensors that stay as they are into one file."""

    file: str
    infos: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)


def make_tasks(
    matrices: Iterable[Planned], copied: Iterable[TensorInfo], dense: bool
) -> tuple[tuple[LayerTask, ...], tuple[CopyTask, ...]]:
    """Return the tasks that compress `matrices` and copy the tensors `copied`, largest first within their kind.

    Args:
        dense: the output holds restored weights.
    """
    layers: dict[str, list[Planned]] = defaultdict(list)
    for info, specs in matrices:
        # The tensor's name counts, because a piece of a tensor outside the layers may contain a number.
        layers[layer_of(info.tensor.name)].append((info, specs))
    parts = [(layer, part) for layer, items in layers.items() for part in _parts(items, dense)]
    fused = {layer: fused_tensors(info for info, _ in items) for layer, items in layers.items()}
    copies = list(copy_groups(copied))
    files = iter(tensor_files(len(parts) + len(copies)))
    layer_tasks = [LayerTask(layer, next(files), part, _completed(fused, layer, part)) for layer, part in parts]
    copy_tasks = [CopyTask(next(files), tuple(infos)) for infos in copies]
    return tuple(sorted(layer_tasks, key=_largest_first)), tuple(sorted(copy_tasks, key=_largest_first))


def _parts(items: Sequence[Planned], dense: bool) -> Iterator[tuple[Planned, ...]]:
    """Cut a layer into parts. A tensor of the dense form cannot be cut, whatever its size."""
    units: dict[str, list[Planned]] = {}
    for info, specs in items:
        units.setdefault(info.tensor.name if dense else info.name, []).append((info, specs))
    for group in bounded_groups(units.values(), lambda unit: sum(info.nbytes for info, _ in unit), FILE_BYTES):
        yield tuple(item for unit in group for item in unit)


def _completed(
    fused: Mapping[str, Sequence[FusedTensor]], layer: str, part: Iterable[Planned]
) -> tuple[FusedTensor, ...]:
    """The fused tensors of the layer of which the part contains the last matrix."""
    names = {info.name for info, _ in part}
    return tuple(tensor for tensor in fused[layer] if tensor.matrices[-1].name in names)


def _largest_first(task: LayerTask | CopyTask) -> int:
    return -task.nbytes


def copy_groups(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Group copied tensors by source file, in its order, with at most FILE_BYTES per group."""
    for _, of_file in groupby(infos, lambda info: info.file):
        yield from bounded_groups(of_file, lambda info: info.nbytes, FILE_BYTES)


def bounded_groups(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield the items in groups of at most `limit` bytes, in their order. A larger item is a group of its own.

    Args:
        nbytes: returns the bytes of an item.
    """
    group: list[T] = []
    filled = 0
    for item in items:
        size = nbytes(item)
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(item)
        filled += size
    if group:
        yield group

"""Which task restores or copies each tensor of a compressed model, and into which file."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.extra_files import ADAPTER_FOLDER
from pipeline.checkpoints.weight_files import tensor_files
from pipeline.models.lora_export import adapter_bytes
from pipeline.models.stored_model import Model
from pipeline.outputs.owned_files import ADAPTER_FILES
from pipeline.planning.tasks import FILE_BYTES, CopyTask, bounded_groups, copy_groups


@dataclass(frozen=True)
class RestoreTask:
    """Compressed tensors of one layer, which are restored into one file of `nbytes` bytes.

    More than `FILE_BYTES` are one tensor.
    """

    layer: str
    file: str
    names: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class RestorePlan:
    """The files of a restored model.

    Attributes:
        adapter_layers: compressed tensor whose low-rank part an adapter carries -> its linear layer; empty without an
            adapter.
        restored: one file per layer with compressed tensors, or several for a layer of more than `FILE_BYTES`.
        copied: files of the other tensors, by source file.
    """

    model: Model
    adapter_layers: Mapping[str, str]
    restored: tuple[RestoreTask, ...]
    copied: tuple[CopyTask, ...]

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors, and of the adapter's."""
        names = [*(task.file for task in self.restored), *(task.file for task in self.copied)]
        return [*names, *(ADAPTER_FILES if self.adapter_layers else ())]

    @property
    def largest_file_bytes(self) -> int:
        """Bytes of the largest file of restored tensors."""
        return max(task.nbytes for task in self.restored)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter."""
        return adapter_bytes(self.model, self.adapter_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, including the adapter's."""
        return sum(self.model.nbytes(name) for name in self.model.names) + self.adapter_bytes

    def rows(self) -> list[dict[str, object]]:
        """The rows of the report: action and reason for every tensor."""
        return [
            {"name": name, "action": action, "reason": reason, "shape": list(self.model.shape(name))}
            for name in self.model.names
            for action, reason in [self._action(name)]
        ]

    def _action(self, name: str) -> tuple[str, str]:
        if not self.model.is_compressed(name):
            return "copied", "was stored as it is"
        if name in self.adapter_layers:
            return "restored", f"was compressed; its low-rank part is in {ADAPTER_FOLDER}"
        pieces = self.model.pieces.get(name, [name])
        whole = self.adapter_layers and any(self.model.entries[piece].low_rank for piece in pieces)
        return "restored", "was compressed" + ("; whole, as it is no linear layer of its own" if whole else "")


def make_restore_plan(model: Model, adapter_layers: Mapping[str, str]) -> RestorePlan:
    """Plan the files of the dense model; nothing is read but the headers of `model`."""
    nbytes = model.nbytes
    layers: dict[str, list[str]] = {}
    copies: dict[str, list[TensorInfo]] = {}
    for name in model.names:
        if model.is_compressed(name):
            layers.setdefault(layer_of(name), []).append(name)
        else:
            info = model.checkpoint.tensors[name]
            copies.setdefault(info.file, []).append(info)
    parts = [(layer, part) for layer, names in layers.items() for part in bounded_groups(names, nbytes, FILE_BYTES)]
    groups = list(copy_groups(chain.from_iterable(copies.values())))
    files = iter(tensor_files(len(parts) + len(groups)))
    restored = tuple(RestoreTask(layer, next(files), tuple(names), sum(map(nbytes, names))) for layer, names in parts)
    copied = tuple(CopyTask(next(files), tuple(infos)) for infos in groups)
    return RestorePlan(model, adapter_layers, restored, copied)

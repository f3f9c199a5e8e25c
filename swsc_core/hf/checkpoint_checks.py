"""Checks that the files of a checkpoint fit its config.json and the model that they are loaded into.

transformers only warns of missing tensors, whose parameters then keep uninitialised memory, and it loads tensors of
wrong shapes where a quantizer is present. These checks run before any weight is read and name the tensor.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from swsc_core.compressed.config_json import part_name
from swsc_core.compressed.entry import Entry
from swsc_core.hf.weight_names import WeightNames
from swsc_core.layers.linear import CompressedWeight
from swsc_core.storage import safetensors_header


class Header(NamedTuple):
    """Dtype (safetensors' name of it, such as "BF16") and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointHeaders:
    """Headers of all tensors of a checkpoint.

    Attributes:
        location: directory or Hub id of the checkpoint, for error messages.
        tensors: tensor name -> header.
    """

    location: str
    tensors: Mapping[str, Header]

    @classmethod
    def read(cls, location: str, files: Iterable[str]) -> Self:
        """Read the headers of all `files`.

        Raises:
            ValueError: a file is cut short or not a safetensors file, or a tensor is stored twice.
        """
        tensors: dict[str, Header] = {}
        for file in files:
            for name, header in _read_header(Path(file)).items():
                if name in tensors:
                    raise ValueError(f"{file}: {name} is also stored in another file; compress or download it again")
                tensors[name] = header
        return cls(location, tensors)

    def require_entries(self, entries: Mapping[str, Entry]) -> None:
        """Raise ValueError unless all parts of every entry are stored with the shapes and kinds it states."""
        for name, entry in entries.items():
            for part, (shape, is_float) in entry.part_shapes().items():
                self._require_part(part_name(name, part), shape, is_float)
        packed_parts = {part_name(name, part) for name in entries for part in ("labels", "zero_points")}
        for stored, (dtype, _) in self.tensors.items():
            if stored.endswith((".labels", ".zero_points")) and dtype == "U8" and stored not in packed_parts:
                raise ValueError(f"{self.location}: {stored} has no entry in config.json; download config.json again")

    def require_remaining_rows(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the rows of a fused tensor that belong to no piece are stored with this shape."""
        self._require_part(tensor, shape, is_float=True)

    def _require_part(self, stored: str, shape: tuple[int, ...], is_float: bool) -> None:
        header = self.tensors.get(stored)
        if header is None:
            raise ValueError(f"{self.location}: {stored} is missing; compress or download it again")
        has_kind = header.dtype.startswith(("F", "BF")) if is_float else header.dtype == "U8"
        if header.shape != shape or not has_kind:
            expected = f"{'floating point values' if is_float else 'U8'} {list(shape)}"
            raise ValueError(
                f"{self.location}: {stored} is {header.dtype} {list(header.shape)}, expected {expected};"
                " compress or download it again"
            )


def _read_header(path: Path) -> dict[str, Header]:
    def read(start: int, count: int) -> bytes:
        file.seek(start)
        return file.read(count)

    try:
        with path.open("rb") as file:
            entries = safetensors_header.read_header(read, path.stat().st_size)[1]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged or cut short ({error}); run `swsc verify`, then compress or download it again"
        ) from None
    return {entry.name: Header(entry.dtype, entry.shape) for entry in entries}


def require_parameter_for(model: Any, tensor: str, location: str) -> None:
    """Raise ValueError for a stored tensor that has no parameter in the model.

    Tensors are exempt if the model is of another class than the checkpoint (which has another head), or if the class
    lists them as unused.
    """
    ignored = model._keys_to_ignore_on_load_unexpected or []
    if _is_checkpoint_class(model) and not any(re.search(pattern, tensor) for pattern in ignored):
        raise ValueError(f"{location}: {tensor} has no parameter in this model; use the checkpoint's own config.json")


def require_all_parameters(model: Any, names: WeightNames, checkpoint: CheckpointHeaders) -> None:
    """Raise ValueError if a parameter is stored in no file.

    A class other than the checkpoint's has a head of its own, which is to be trained; then only its base model is
    checked.
    """
    is_complete = _is_checkpoint_class(model) or not hasattr(model, model.base_model_prefix)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or []]
    loaded, tied = names.loaded_parameters(checkpoint.tensors), model.all_tied_weights_keys
    for name in model.state_dict():
        tied_names = {name, tied.get(name), *(target for target, source in tied.items() if source == name)}
        is_required = is_complete or name.startswith(f"{model.base_model_prefix}.")
        if is_required and not tied_names & loaded and not any(pattern.search(name) for pattern in ignored):
            raise ValueError(f"{checkpoint.location}: nothing is stored for {name}; compress or download it again")


def require_shapes(model: Any, names: WeightNames, checkpoint: CheckpointHeaders, restored: Collection[str]) -> None:
    """Raise ValueError if a tensor that is neither converted nor restored has another shape than its parameter.

    transformers 5.19 loads such a tensor without complaint. Heads other than the model's output embedding are left to
    transformers, which can be asked to initialize them again.
    """
    state, head = model.state_dict(), model.get_output_embeddings()
    prefixes = [f"{model.base_model_prefix}."] if hasattr(model, model.base_model_prefix) else [""]
    prefixes += [f"{path}." for path, layer in model.named_modules() if layer is head]
    for stored, (dtype, shape) in checkpoint.tensors.items():
        parameter, pattern = names.target(stored)
        if pattern or stored in restored or parameter not in state or not parameter.startswith(tuple(prefixes)):
            continue
        if (expected := tuple(state[parameter].shape)) != shape:
            raise ValueError(
                f"{checkpoint.location}: {stored} is {dtype} {list(shape)}, expected {list(expected)} in this model;"
                " use the checkpoint's own config.json"
            )


def _is_checkpoint_class(model: Any) -> bool:
    return type(model).__name__ in (model.config.architectures or [])


def require_valid_parts(path: str, layer: CompressedWeight) -> None:
    """Raise ValueError if a layer in memory holds invalid values, such as labels of no centroid."""
    if layer.weight.device.type != "meta":
        try:
            layer.matrix.require_valid()
        except ValueError as error:
            raise ValueError(f"{path}: {error}; run `swsc verify`, then compress or download it again") from None


def require_unwrapped(paths: Iterable[str]) -> None:
    """Raise ValueError for layers still wrapped by a deleted adapter, whose saved names nothing would open."""
    if wrapped := next((path for path in paths if path.endswith(".base_layer")), None):
        raise ValueError(
            f"{wrapped}: this layer is still wrapped by a deleted adapter; open the model again before saving it"
        )

"""A model of transformers whose buffers hold values and whose parameters are on the meta device until they are loaded.

Parameters are loaded by the conversions of transformers itself, from exactly the tensors that they need: the values are
those of `from_pretrained`, and what is not loaded takes no memory.
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import nn

from pipeline.blocks.reader import TensorReader
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.errors import CheckpointError
from pipeline.models.loading import ModelKey, arithmetic_dtype
from pipeline.models.meta_loading import load_meta_model, loading_errors
from pipeline.models.stored_model import Model
from swsc_core import align
from swsc_core.hf.weight_names import WeightNames


def empty_model(kind: Any, config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model of class `kind` with parameters on the meta device, and with buffers as `from_pretrained` computes them.

    Buffers that a checkpoint stores stay on the meta device, too.
    """
    with torch.device("meta"):
        model = kind._from_config(copy.deepcopy(config), dtype=dtype)
    # The steps by which `from_pretrained` computes the buffers that no checkpoint stores, such as rotary frequencies.
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    model._initialize_missing_keys(False)
    return model.eval().requires_grad_(False)


class Skeleton:
    """A model of which any parameters can be loaded and released.

    Attributes:
        model: the causal LM.
        source: what its parameters are loaded from.
    """

    def __init__(self, source: Model, key: ModelKey, device: str, digests: RangeDigests | None = None) -> None:
        """Build the model without parameters.

        Args:
            source: the stored model.
            key: dtype and trust.
            device: torch's name of the device that parameters are loaded to.
            digests: filled with the digests of the tensors that are read and stored dense, if given.

        Raises:
            CheckpointError: transformers cannot build the model.
        """
        self.source, self._device = source, device
        self._reader = TensorReader(source, digests)
        with loading_errors(key.location):
            empty = load_meta_model(key.location, key.trusted)
            self._dtype = getattr(torch, arithmetic_dtype(source, key, empty.config, device))
            self.model = empty_model(type(empty.model), empty.config, self._dtype, device)
            self.model.generation_config = empty.model.generation_config
            self._stored = _stored_names(self.model, source)
        self._ties = _ties(self.model, self._stored.keys())

    def load(self, parameters: Iterable[str]) -> None:
        """Load parameters and stored buffers by their names in the model; those that are loaded stay as they are.

        An error leaves none of the others loaded, because values that are not shared and aligned would be used later.

        Raises:
            CheckpointError: the files lack one of them.
        """
        names = [name for name in parameters if self._is_meta(name)]
        if not names:
            return
        try:
            with loading_errors(self.source.checkpoint.store.root):
                self._convert(sorted(self.stored_names(names)))
            for name in names:
                self._share(name)
                align_parameter(self.model, name)
        except BaseException:
            self.release(names)
            raise

    def release(self, parameters: Iterable[str]) -> None:
        """Free the memory of parameters and stored buffers."""
        for name in parameters:
            for alias in self._ties.get(name, (name,)):
                tensor = self.model.get_parameter_or_buffer(alias)
                set_parameter(self.model, alias, tensor.to("meta"))

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from files so far."""
        return self._reader.bytes_read

    def read_ahead(self, parameters: Iterable[str]) -> None:
        """Begin to read what parameters are loaded from, in a thread of its own."""
        self._reader.read_ahead(sorted(self.stored_names(filter(self._is_meta, parameters))))

    def stored_names(self, parameters: Iterable[str]) -> set[str]:
        """Names of the stored tensors that parameters are loaded from."""
        return {stored for name in parameters for stored in self._stored_as(name)}

    def nbytes(self, parameters: Iterable[str]) -> int:
        """Bytes of the stored tensors that these parameters are loaded from; each counts once."""
        return sum(map(self._reader.stored_bytes, self.stored_names(parameters)))

    def _is_meta(self, name: str) -> bool:
        return bool(self.model.get_parameter_or_buffer(name).is_meta)

    def _stored_as(self, name: str) -> list[str]:
        """Names in the checkpoint of the tensors that a parameter, or one that is tied to it, is loaded from."""
        for alias in self._ties.get(name, (name,)):
            if alias in self._stored:
                return self._stored[alias]
        raise CheckpointError(
            f"{self.source.checkpoint.store.root}: the files lack {name} of the {type(self.model).__name__} in"
            " config.json; provide all files of the model, or repair config.json"
        )

    def _convert(self, stored: list[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        how = LoadStateDictConfig(
            device_map={"": self._device},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=cast(Any, get_model_conversion_mapping(self.model)),
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, self._reader.lazy(stored), how)
        if info.conversion_errors or info.mismatched_keys or info.error_msgs:
            problems = (*info.conversion_errors, *info.mismatched_keys, *info.error_msgs)
            raise CheckpointError(f"{self.source.checkpoint.store.root}: cannot be loaded: {problems[0]}")

    def _share(self, name: str) -> None:
        """Give a loaded parameter to those that are tied to it."""
        aliases = self._ties.get(name, ())
        loaded = [tensor for alias in aliases if not (tensor := self.model.get_parameter_or_buffer(alias)).is_meta]
        for alias in aliases if loaded else ():
            set_parameter(self.model, alias, loaded[0])
        self.model.get_parameter_or_buffer(name).requires_grad_(False)


def align_parameter(model: nn.Module, name: str) -> None:
    """Move one parameter or buffer to aligned memory, see `swsc_core.align`."""
    module, _, last = name.rpartition(".")
    holder = nn.Module()
    holder._parameters[last] = model.get_submodule(module)._parameters.get(last)
    holder._buffers[last] = model.get_submodule(module)._buffers.get(last)
    align(holder)


def set_parameter(model: Any, name: str, tensor: Any) -> None:
    """Replace a parameter or buffer of a model."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    else:
        module._buffers[last] = tensor


def _stored_names(model: Any, source: Model) -> dict[str, list[str]]:
    """Parameter or stored buffer -> names of the tensors in the checkpoint that it is loaded from."""
    names = WeightNames(model)
    stored: dict[str, list[str]] = defaultdict(list)
    for name in (*source.names, *(info.name for info in source.checkpoint.buffers)):
        for parameter in names.loaded_parameters([name]):
            stored[parameter].append(name)
    return dict(stored)


def _ties(model: Any, stored: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Tied parameter -> the names of all that share it.

    As in transformers, parameters that are stored separately are not tied.
    """
    groups: dict[str, set[str]] = {}
    for alias, shared in model.all_tied_weights_keys.items():
        group = groups.get(alias, {alias}) | groups.get(shared, {shared})
        groups |= dict.fromkeys(group, group)
    tied = {name: group for name, group in groups.items() if sum(alias in stored for alias in group) < 2}
    return {name: tuple(sorted(group)) for name, group in tied.items()}

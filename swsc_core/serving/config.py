"""`ServedConfig`: the part of an engine's quantization config that decides which method loads and computes each layer.

vLLM and SGLang inherit their quantization interface from the same origin, so both use this class.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from swsc_core.compressed.config_json import compressed_tensors, entries_of
from swsc_core.compressed.entry import Entry
from swsc_core.serving.weight_loader import CheckpointTensor

# last names of output heads, which have the shape of the embedding
_HEAD_NAMES = ("lm_head", "embed_out", "output")


class ServedConfig:
    """Compressed tensors of a checkpoint, and the method of each layer. An engine's config class derives from it.

    Class attributes, which an engine's class sets to the engine's own classes:
        linear, embedding, head: layer classes.
        linear_method, embedding_method: methods of compressed layers.
        dense_linear_method, dense_head_method: methods of layers that are not compressed.
    """

    linear: ClassVar[type]
    embedding: ClassVar[type]
    head: ClassVar[type]
    linear_method: ClassVar[type]
    embedding_method: ClassVar[type]
    dense_linear_method: ClassVar[type]
    dense_head_method: ClassVar[type]
    # fused layer -> names of the layers in the checkpoint; set by the engine
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self.compressed = compressed_tensors(entries)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ServedConfig":
        """Construct from `quantization_config` of config.json.

        Raises:
            ValueError: this release does not read the format version, or an entry is damaged.
        """
        return cls(entries_of(config))

    def get_name(self) -> str:
        return "swsc"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def rename_tensors(self, mapper: Any) -> None:
        """Rename the tensors of the checkpoint to the engine's module names, by the engine's own mapper."""
        self.compressed = mapper.apply_dict(self.compressed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of the layer named `prefix`; None where the engine's default serves.

        Raises:
            ValueError: the layer holds a compressed tensor that cannot be served compressed.
        """
        if isinstance(layer, self.linear):
            sources = self._sources(prefix)
            is_compressed = any(source.compressed for source in sources)
            return self.linear_method(sources) if is_compressed else self.dense_linear_method()
        if isinstance(layer, self.embedding):
            return self._embedding_method(layer, prefix)
        if names := self.compressed_names(prefix):
            raise ValueError(f"{names[0]}: a {type(layer).__name__} is not served compressed; `swsc restore` first")
        return None

    def checkpoint_tensor(self, name: str) -> CheckpointTensor:
        """The tensor of the checkpoint with this name, which is given without ".weight"."""
        return CheckpointTensor(name, self.compressed.get(f"{name}.weight"))

    def compressed_names(self, prefix: str) -> list[str]:
        """Names of the compressed tensors inside the module `prefix`."""
        return [name for name in self.compressed if prefix and name.startswith(f"{prefix}.")]

    def _sources(self, prefix: str) -> list[CheckpointTensor]:
        """The tensors of the checkpoint that the engine's linear layer `prefix` fuses."""
        parent, _, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last, [last])
        return [self.checkpoint_tensor(f"{parent}.{name}" if parent else name) for name in names]

    def _embedding_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, self.head):
            (source,) = self._sources(prefix)
            return self.embedding_method([source]) if source.compressed else self.dense_head_method()
        shape = [layer.org_vocab_size, layer.embedding_dim]
        names = [prefix] if f"{prefix}.weight" in self.compressed else self._embedding_names(shape)
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} may each be the embedding; `swsc restore` first")
        return self.embedding_method([self.checkpoint_tensor(names[0])]) if names else None

    def _embedding_names(self, shape: list[Any]) -> list[str]:
        """Names of tensors that may be the embedding, for engines that pass no name: its shape, no name of a head."""
        whole = {name.removesuffix(".weight"): t.entries[""] for name, t in self.compressed.items() if not t.is_fused}
        return [
            name
            for name, entry in whole.items()
            if list(entry.shape) == shape and name.rpartition(".")[2] not in _HEAD_NAMES
        ]

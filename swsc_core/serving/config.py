"""What the quantization interfaces of vLLM and SGLang want of a format: here, a config, which says what each layer's method is."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from swsc_core.compressed.config_json import compressed_tensors, entries_of
from swsc_core.compressed.entry import Entry
from swsc_core.serving.weight_loader import CheckpointTensor

HEADS = ("lm_head", "embed_out", "output")  # last names of heads, which share the shape of the embedding


class ServedConfig:
    """`quantization_config` of config.json: which layers are compressed. An engine's config class is made of it and of its base.

    The class attributes are the engine's own classes.
    """

    linear: ClassVar[type]
    embedding: ClassVar[type]
    head: ClassVar[type]
    linear_method: ClassVar[type]
    embedding_method: ClassVar[type]
    dense_linear_method: ClassVar[type]
    dense_head_method: ClassVar[type]
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self.compressed = compressed_tensors(entries)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ServedConfig":
        """Of `quantization_config`; ValueError for a newer format, or entries that are damaged."""
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

    def rename(self, mapper: Any) -> None:
        """Names of the checkpoint become those of the engine's modules, by its own mapper."""
        self.compressed = mapper.apply_dict(self.compressed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer by its name; None where the engine's own serves.

        Raises:
            ValueError: something compressed that cannot be served compressed.
        """
        if isinstance(layer, self.linear):
            sources = self._sources(prefix)
            compressed = any(source.compressed for source in sources)
            return self.linear_method(sources) if compressed else self.dense_linear_method()
        if isinstance(layer, self.embedding):
            return self._embedding_method(layer, prefix)
        if inside := self.inside(prefix):
            raise ValueError(f"{inside[0]}: a {type(layer).__name__} is not served compressed; `swsc restore` first")
        return None

    def source(self, name: str) -> CheckpointTensor:
        """The tensor of the checkpoint whose name, without ".weight", is `name`."""
        return CheckpointTensor(name, self.compressed.get(f"{name}.weight"))

    def inside(self, prefix: str) -> list[str]:
        """Names of the compressed tensors of a layer that is not linear and no embedding."""
        return [name for name in self.compressed if prefix and name.startswith(f"{prefix}.")]

    def _sources(self, prefix: str) -> list[CheckpointTensor]:
        parent, _, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last, [last])
        return [self.source(f"{parent}.{name}" if parent else name) for name in names]

    def _embedding_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, self.head):
            (source,) = self._sources(prefix)
            return self.embedding_method([source]) if source.compressed else self.dense_head_method()
        shape = [layer.org_vocab_size, layer.embedding_dim]
        found = [prefix] if f"{prefix}.weight" in self.compressed else self._embeddings(shape)
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} may each be the embedding; `swsc restore` first")
        return self.embedding_method([self.source(found[0])]) if found else None

    def _embeddings(self, shape: list[Any]) -> list[str]:
        """Names of what may be the embedding, where an engine does not say the name: nothing else but a head has its shape."""
        whole = {name.removesuffix(".weight"): e.entries[""] for name, e in self.compressed.items() if not e.is_fused}
        return [name for name, e in whole.items() if list(e.shape) == shape and name.rpartition(".")[2] not in HEADS]

"""What the quantization interfaces of vLLM and SGLang, which have one origin, want of a format: a method a layer and a config.

Neither engine is imported here. Theirs are the base classes and the door (vllm.py, sglang.py), ours is what is done: empty
parameters under the names of the parts, which hand what is loaded to a `Loading`, and in their place its module afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swsc_core.codec import part_shapes
from swsc_core.format import entries_of
from swsc_core.serving.loading import Loading, Place, ServedEmbedding, ServedLinear, Source, linear_place

HEADS = ("lm_head", "embed_out", "output")  # last names of heads, which share the shape of the embedding


class ServedMethod:
    """Creates, loads and applies the weights of a layer of `sources`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    def ranks_of(self, layer: nn.Module) -> tuple[int, int]:
        """Rank of this process in the layer's tensor parallel group, and the group's size."""
        raise NotImplementedError

    def place(self, layer: nn.Module, width: int, sizes: Sequence[int]) -> tuple[Sequence[Source], Place]:
        """The sources with the sizes of the rank's slices, and where these lie."""
        if len(self.sources) not in (1, len(sizes)):
            names = ", ".join(source.name for source in self.sources)
            raise ValueError(f"{names}: {len(sizes)} slices of these are not served compressed; `swsc restore` first")
        cut = [tuple(sizes)] if len(self.sources) == 1 else [(size,) for size in sizes]
        sources = [Source(source.name, source.entry, own) for source, own in zip(self.sources, cut, strict=True)]
        return sources, linear_place(width, *self.ranks_of(layer))

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: Sequence[int],
        input_size: int, output_size: int, params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        """Empty parameters under the names of the parts; what is loaded into them waits in `layer.swsc_loading`."""
        sources, place = self.place(layer, input_size_per_partition, output_partition_sizes)
        layer.swsc_loading = loading = Loading(sources, place, params_dtype)  # type: ignore[assignment]
        for part, dtype in loading.parts().items():
            empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            empty.weight_loader = _loader(loading, part)  # type: ignore[attr-defined]
            layer.register_parameter(part, empty)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The module that computes takes the place of the empty parameters; ValueError, naming what has not come."""
        loading = layer.swsc_loading
        assert isinstance(loading, Loading)
        for part in loading.parts():
            delattr(layer, part)
        del layer.swsc_loading
        layer.swsc = self.finished(layer, loading)

    def finished(self, layer: nn.Module, loading: Loading) -> nn.Module:
        """The module that computes with the rank's slices."""
        return ServedLinear(loading.slices())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] -> [..., m of the rank]."""
        return layer.swsc(x, bias)  # type: ignore[operator]


class ServedEmbeddingMethod(ServedMethod):
    """Of an embedding or a head, whose rows are dealt out as its `shard_indices` say."""

    def place(self, layer: nn.Module, width: int, sizes: Sequence[int]) -> tuple[Sequence[Source], Place]:
        indices: Any = layer.shard_indices
        first, last = indices.org_vocab_start_index, indices.org_vocab_end_index
        if first == last or indices.num_added_elements:
            raise ValueError(
                f"{self.sources[0].name}: use fewer ranks, and no added vocabulary, or `swsc restore` first"
            )
        return self.sources, lambda source, shape: [((first, last), (0, shape[1]))]

    def finished(self, layer: nn.Module, loading: Loading) -> nn.Module:
        (cut,) = loading.slices()
        assert isinstance(cut, tuple)
        return ServedEmbedding(cut, int(layer.num_embeddings_per_partition), loading.dtype)  # type: ignore[arg-type]

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids int64 [...], of the rank's own rows -> [..., n]."""
        return layer.swsc.embedding(ids)  # type: ignore[operator, union-attr]


def _loader(loading: Loading, part: str) -> Callable[..., None]:
    def load(parameter: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        loading.take(part, tensor, shard, parameter.device)

    return load


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

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.entries = dict(entries)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ServedConfig":
        """Of `quantization_config`; ValueError for a newer format, or entries that do not fit their matrices."""
        entries = entries_of(config)
        if not isinstance(entries, Mapping):
            raise ValueError("quantization_config does not say what is compressed; compress again")
        for name, entry in entries.items():
            try:
                part_shapes(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{name}: its entry in quantization_config is damaged ({error}); compress again"
                ) from error
            if entry.get("tensor") or entry.get("transposed"):
                raise ValueError(
                    f"{name}: pieces of joined matrices, and transposed ones, are not served compressed; `swsc restore` first"
                )
        return cls(entries)

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
        self.entries = mapper.apply_dict(self.entries)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer by its name; None where the engine's own serves.

        Raises:
            ValueError: something compressed that cannot be served compressed.
        """
        if isinstance(layer, self.linear):
            sources = self._sources(prefix)
            compressed = any(source.entry for source in sources)
            return self.linear_method(sources) if compressed else self.dense_linear_method()
        if isinstance(layer, self.embedding):
            return self._embedding_method(layer, prefix)
        inside = [name for name in self.entries if prefix and name.startswith(f"{prefix}.")]
        if inside:
            raise ValueError(f"{inside[0]}: a {type(layer).__name__} is not served compressed; `swsc restore` first")
        return None

    def _sources(self, prefix: str) -> list[Source]:
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(last, [last])]
        return [Source(name, self.entries.get(f"{name}.weight")) for name in names]

    def _embedding_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, self.head):
            (source,) = self._sources(prefix)
            if source.entry is None:
                return self.dense_head_method()
            return self.embedding_method([source])
        shape = [layer.org_vocab_size, layer.embedding_dim]
        found = [prefix] if f"{prefix}.weight" in self.entries else self._embeddings(shape)
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} may each be the embedding; `swsc restore` first")
        return self.embedding_method([Source(found[0], self.entries[f"{found[0]}.weight"])]) if found else None

    def _embeddings(self, shape: list[Any]) -> list[str]:
        """Names of what may be the embedding, where an engine does not say the name: nothing else but a head has its shape."""
        named = {name.removesuffix(".weight"): entry for name, entry in self.entries.items()}
        return [name for name, e in named.items() if e["shape"] == shape and name.rpartition(".")[2] not in HEADS]

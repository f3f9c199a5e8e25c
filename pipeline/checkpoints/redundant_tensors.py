"""Finds redundant tensors of a checkpoint: tied output heads, and buffers that the model computes.

They would count as weights, and a head that is copied beside a compressed embedding would no longer be tied to it. The
model's class in transformers decides which names are tied; config.json decides only for models without such a class.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pipeline.architectures.model_config import TEXT_CONFIG, ModelConfig, text_config, text_part
from pipeline.errors import CheckpointError
from pipeline.storage.store import Store

if TYPE_CHECKING:
    from pipeline.architectures.tensor_info import TensorInfo

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_TIE_KEY = "tie_word_embeddings"
# Samples of two tensors that are compared before all of their bytes.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
_IN_A_LAYER = re.compile(r"\.\d+\.")


class Tie(NamedTuple):
    """Names of two tied tensors in the checkpoint, usually of the output head and of the embedding that it shares."""

    name: str
    shares: str


class Copies(NamedTuple):
    """Tied pairs of which both tensors are stored, with equal values and with different values."""

    equal: tuple[Tie, ...]
    different: tuple[Tie, ...]


def find_ties(names: Iterable[str], config: ModelConfig, location: str) -> list[Tie]:
    """Return the ties of the model that a config describes; either name of a pair may be among the stored `names`."""
    from pipeline.checkpoints.meta_model import UnknownModel, stored_ties

    names = list(names)
    try:
        return [Tie(*pair) for pair in stored_ties(names, config, location)]
    except (UnknownModel, CheckpointError):  # custom code, or a config that agreement.py refuses
        embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
        return [Tie(_HEAD, embedding)] if text_config(config).get(_TIE_KEY) and embedding else []


def find_copies(store: Store, tensors: Mapping[str, "TensorInfo"], config: ModelConfig) -> Copies:
    """Find tied tensors that are stored twice. transformers is imported only if two tensors have the same shape.

    If the values of one pair differ, the model is not tied (`untied_config`), so that pairs with equal values count as
    weights too.
    """
    if (config.get(_TIE_KEY) is False and not text_part(config)) or not _may_hold_copies(tensors):
        return Copies((), ())
    ties = [tie for tie in find_ties(tensors, config, store.root) if tie.name in tensors and tie.shares in tensors]
    different = [tie for tie in ties if not _are_equal(store, tensors[tie.name], tensors[tie.shares])]
    return Copies(() if different else tuple(ties), tuple(different))


def untied_config(config: ModelConfig) -> ModelConfig:
    """Return the config of a model whose head is not tied, as transformers loads a head with values of its own."""
    text = text_part(config)
    return {**config, _TIE_KEY: False, **({TEXT_CONFIG: {**text, _TIE_KEY: False}} if text else {})}


def _may_hold_copies(tensors: Mapping[str, "TensorInfo"]) -> bool:
    """Whether two matrices outside of layers have the same shape and dtype."""
    outside = [info for name, info in tensors.items() if len(info.shape) == 2 and not _IN_A_LAYER.search(name)]
    return len({(info.shape, info.dtype) for info in outside}) < len(outside)


def _are_equal(store: Store, first: "TensorInfo", second: "TensorInfo") -> bool:
    """Compare evenly spaced samples and, if they are equal, all bytes."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    last = max(0, first.nbytes - _SAMPLE_BYTES)
    starts = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
    if not all(_sample(store, first, start) == _sample(store, second, start) for start in starts):
        return False
    streams = (store.stream(info.file, info.start, info.nbytes) for info in (first, second))
    return all(pieces[0] == pieces[1] for pieces in zip(*streams, strict=True))


def _sample(store: Store, info: "TensorInfo", start: int) -> bytearray:
    return store.read(info.file, info.start + start, min(_SAMPLE_BYTES, info.nbytes - start))


def is_buffer(info: "TensorInfo") -> bool:
    """Whether the tensor is a causal mask or a table of rotary frequencies, which older files contain.

    A mask has four dimensions, whereas a bias of the same name has one; `masked_bias` has a single value.
    """
    if not _BUFFER.search(info.name):
        return False
    return len(info.shape) == 4 or info.name.endswith("inv_freq") or info.count == 1

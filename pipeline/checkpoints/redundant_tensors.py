"""Redundant tensors of a checkpoint: heads that are the embedding, whether they are stored or not, and buffers that a model makes anew.

They would be counted as weights, and a head that is copied beside a compressed embedding would no longer be tied to it. Whether
and under which names they are tied is what transformers' class of the model says; only without one config.json's own words count.
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
_SAID = "tie_word_embeddings"
_PIECES, _PIECE_BYTES = 64, 1 << 16  # of both tensors, that are compared at first
_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
_IN_A_LAYER = re.compile(r"\.\d+\.")


class Tie(NamedTuple):
    """Two names of one tensor, as checkpoints have them: the head's, mostly, and the embedding's."""

    name: str
    shares: str


class Copies(NamedTuple):
    """Stored tensors that are tied to another one which is stored, too: equal ones, and those that hold other values."""

    equal: tuple[Tie, ...]
    different: tuple[Tie, ...]


def find_ties(names: Iterable[str], config: ModelConfig, where: str) -> list[Tie]:
    """The ties of the model that a config.json describes, whichever of their names are among the stored `names`."""
    from pipeline.checkpoints.meta_model import UnknownModel, stored_ties

    names = list(names)
    try:
        return [Tie(*pair) for pair in stored_ties(names, config, where)]
    except (UnknownModel, CheckpointError):  # code of its own, or a config that agreement.py refuses
        embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
        return [Tie(_HEAD, embedding)] if text_config(config).get(_SAID) and embedding else []


def find_copies(store: Store, tensors: Mapping[str, "TensorInfo"], config: ModelConfig) -> Copies:
    """Tied tensors that are stored twice. No code of transformers is loaded unless two tensors of one shape call for it.

    Where one pair holds unlike values config.json's ties go (`untied`), and with them those of the equal ones.
    """
    if (config.get(_SAID) is False and not text_part(config)) or not _may_hold_copies(tensors):
        return Copies((), ())
    ties = [tie for tie in find_ties(tensors, config, store.root) if tie.name in tensors and tie.shares in tensors]
    different = [tie for tie in ties if not _are_equal(store, tensors[tie.name], tensors[tie.shares])]
    return Copies(() if different else tuple(ties), tuple(different))


def untied_config(config: ModelConfig) -> ModelConfig:
    """A config.json that says what transformers does with a head that is stored with values of its own: it is not tied."""
    text = text_part(config)
    return {**config, _SAID: False, **({TEXT_CONFIG: {**text, _SAID: False}} if text else {})}


def _may_hold_copies(tensors: Mapping[str, "TensorInfo"]) -> bool:
    """Whether two matrices outside of layers have one shape and dtype."""
    outside = [info for name, info in tensors.items() if len(info.shape) == 2 and not _IN_A_LAYER.search(name)]
    return len({(info.shape, info.dtype) for info in outside}) < len(outside)


def _are_equal(store: Store, one: "TensorInfo", other: "TensorInfo") -> bool:
    """By pieces at even distances, then, if these are equal, as a whole."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    last = max(0, one.nbytes - _PIECE_BYTES)
    starts = sorted({last * number // (_PIECES - 1) for number in range(_PIECES)})
    if not all(_piece(store, one, start) == _piece(store, other, start) for start in starts):
        return False
    pieces = (store.stream(info.file, info.start, info.nbytes) for info in (one, other))
    return all(mine == theirs for mine, theirs in zip(*pieces, strict=True))


def _piece(store: Store, info: "TensorInfo", start: int) -> bytearray:
    return store.read(info.file, info.start + start, min(_PIECE_BYTES, info.nbytes - start))


def is_buffer(info: "TensorInfo") -> bool:
    """Whether it is a causal mask or a table of frequencies, as older files of GPT-2, GPT-NeoX or Llama hold them.

    A bias of the same name has one dimension, a mask has four; of a `masked_bias` there is one value.
    """
    if not _BUFFER.search(info.name):
        return False
    return len(info.shape) == 4 or info.name.endswith("inv_freq") or info.count == 1

"""Tensors of a checkpoint that are no weights of their own: a tied head that is stored twice, buffers that a model makes anew.

They would be counted as weights, and a head that is copied beside a compressed embedding would no longer be tied to it.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.model.store import Store

if TYPE_CHECKING:
    from pipeline.model.tensors import TensorInfo

HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_PIECES, _PIECE_BYTES = 64, 1 << 16  # of both tensors, that are compared
_BUFFER = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def embedding_of_tied(tensors: Mapping[str, "TensorInfo"], config: Mapping[str, Any]) -> "TensorInfo | None":
    """The embedding that is the output head, too; None if config says nothing of it."""
    text: Mapping[str, Any] = config.get("text_config") or config
    embedding = next((info for name, info in tensors.items() if name.endswith(_EMBEDDING)), None)
    return embedding if text.get("tie_word_embeddings", config.get("tie_word_embeddings")) else None


def is_stored_twice(store: Store, tensors: Mapping[str, "TensorInfo"], config: Mapping[str, Any]) -> bool:
    """Whether the head is a copy of the embedding that it is tied to, by pieces at even distances."""
    head, embedding = tensors.get(HEAD), embedding_of_tied(tensors, config)
    if head is None or embedding is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    last = max(0, head.nbytes - _PIECE_BYTES)
    starts = sorted({last * number // (_PIECES - 1) for number in range(_PIECES)})
    return all(_piece(store, head, start) == _piece(store, embedding, start) for start in starts)


def _piece(store: Store, info: "TensorInfo", start: int) -> bytearray:
    return store.read(info.file, info.start + start, min(_PIECE_BYTES, info.nbytes - start))


def is_buffer(info: "TensorInfo") -> bool:
    """Whether it is a causal mask or a table of frequencies, as older files of GPT-2, GPT-NeoX or Llama hold them.

    A bias of the same name has one dimension, a mask has four; of a `masked_bias` there is one value.
    """
    if not _BUFFER.search(info.name):
        return False
    return len(info.shape) == 4 or info.name.endswith("inv_freq") or info.count == 1

"""The two parts of a compressed matrix, each by itself: what is shared, W', and the low-rank part that makes up for its error.

W = W' + leftᵀ · right (paper, section III-C) is what a LoRA adapter on a dense layer W' is, too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swsc_core.codec import decode, matrix_of, require_parts
from swsc_core.values import Values


def shared_part(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """W', [m, n], in the weight's own dtype; ValueError as from `decode`."""
    require_parts(tensors, entry)
    m, n = entry["shape"]
    bare = {"left": torch.empty(0, m), "right": torch.empty(0, n)}
    return decode({**tensors, **bare}, {**entry, "rank": 0, "factor_bits": None})


def low_rank_part(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """left [r, m] and right [r, n], exactly: in their own dtype, or float32 where they are stored in few bits.

    Raises:
        ValueError: the parts do not fit the entry.
    """
    require_parts(tensors, entry)
    matrix = matrix_of(tensors, entry)
    return _plain(matrix.left), _plain(matrix.right)


def _plain(values: Values) -> Tensor:
    return values.data if values.bits is None and values.data.itemsize > 1 else values.expand()

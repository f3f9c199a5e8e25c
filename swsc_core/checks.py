"""Checks shared by the public functions. Errors name the tensor, what was found, what was expected, and the remedy."""

import hashlib

import torch
from torch import Tensor

# Values that are examined at a time, so that temporaries stay in a cache.
_BLOCK_VALUES = 1 << 20


class InvalidWeightError(ValueError):
    """The weights cannot be compressed with any settings: NaN, Inf, or not a matrix."""


def require_matrix(name: str, weight: Tensor) -> None:
    """Raise InvalidWeightError unless `weight` is a non-empty 2-D floating point tensor of finite values."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise InvalidWeightError(
            f"{name}: shape {list(weight.shape)}, expected a non-empty 2-D matrix; exclude this tensor"
        )
    if not weight.is_floating_point():
        raise InvalidWeightError(f"{name}: dtype {weight.dtype}, expected a floating point matrix; exclude this tensor")
    if count := count_nonfinite(weight):
        raise InvalidWeightError(
            f"{name}: {count} of {weight.numel()} values are NaN or Inf; repair the checkpoint or exclude this tensor"
        )


def count_nonfinite(values: Tensor) -> int:
    """Number of values that are NaN or Inf."""
    count = 0
    for block in torch.split(values.reshape(-1), _BLOCK_VALUES):
        # fp8 has no isfinite kernel; float32 holds every fp8 value.
        count += int((~torch.isfinite(block.float())).sum())
    return count


def require_range(name: str, parameter: str, value: int, low: int, high: int) -> None:
    """Raise ValueError, with the range, unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {parameter} {value} is out of range; choose {low} to {high}")


def derive_seed(run_seed: int, name: str) -> int:
    """Seed of one tensor, from the run's seed and the tensor's name.

    It depends on nothing else, so that results do not depend on the order of tensors, the number of workers, or a
    retry.
    """
    digest = hashlib.sha256(f"{run_seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

"""Checks shared by the public functions: what came, what was wanted, and the remedy, in one line."""

import hashlib

import torch
from torch import Tensor

_PART_VALUES = 1 << 20  # that are looked at at a time: what is made of them stays in a cache


class InvalidWeightError(ValueError):
    """The weights themselves cannot be compressed (NaN, Inf, not a matrix), whatever the settings."""


def require_matrix(name: str, weight: Tensor) -> None:
    """Raise InvalidWeightError unless `weight` is a non-empty 2-D floating point tensor of finite values."""
    if weight.dim() != 2 or weight.numel() == 0:
        raise InvalidWeightError(
            f"{name}: shape {list(weight.shape)}, wanted a non-empty 2-D matrix; exclude this tensor"
        )
    if not weight.is_floating_point():
        raise InvalidWeightError(f"{name}: dtype {weight.dtype}, wanted a floating point matrix; exclude this tensor")
    if bad := not_finite(weight):
        raise InvalidWeightError(
            f"{name}: {bad} of {weight.numel()} values are NaN or Inf; repair the checkpoint or exclude this tensor"
        )


def not_finite(values: Tensor) -> int:
    """Number of values that are NaN or Inf, counted a part at a time."""
    # fp8 has no isfinite kernel; float32 holds every fp8 value.
    return sum(int((~torch.isfinite(part.float())).sum()) for part in values.reshape(-1).split(_PART_VALUES))


def require_range(name: str, what: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless low <= value <= high; the message says the range."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {what} {value} is out of range; choose {low} to {high}")


def derive_seed(run_seed: int, name: str) -> int:
    """Seed of one tensor, from the run's seed and the tensor's name alone.

    So that results do not depend on the order of tensors, on the number of workers, or on a retry.
    """
    digest = hashlib.sha256(f"{run_seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

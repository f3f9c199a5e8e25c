"""What CUDA does with an operation: is it a kernel, does the host wait for it, has its sum a fixed order?

By PyTorch's own lists: `torch.use_deterministic_algorithms` for the order, `torch.cuda.set_sync_debug_mode` for
waiting.
"""

import re
from typing import Any

import torch
from torch import Tensor

# Operations that launch nothing: they give memory, or another view of it.
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "expand",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "unbind",
        "diagonal",
        "lift_fresh",
        "empty",
        "new_empty",
        "empty_like",
        "_reshape_alias",
        "narrow",
        "chunk",
        "unfold",
        "empty_strided",
        "new_empty_strided",
        "is_same_size",
        "_conj",
        "view_as_real",
        "resolve_conj",
        "set_",
        "resize_",
        "movedim",
    ]
)
# Operations whose result the host waits for: its value, or its size.
WAITS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
        "is_nonzero",
        "bincount",
        "masked_select",
        "_linalg_check_errors",
    ]
)
# With a switch on (`torch.use_deterministic_algorithms`) these have a fixed order; without it, none.
SWITCHED = re.compile(
    r"index_add_?|scatter_add_?|scatter_reduce_?|index_copy_?|scatter_?|index_put_?|_index_put_impl_|convolution_backward"
    r"|replication_pad\dd_backward|_scaled_dot_product_\w+_backward|_flash_attention_backward|_efficient_attention_backward"
)
# These have none, and raise with the switch on.
UNORDERED = re.compile(
    r"put_|histc|kthvalue|median|nanmedian|cumsum_?|cumprod_?|logcumsumexp|_ctc_loss\w*|nll_loss2d\w*|_embedding_bag\w*"
    r"|grid_sampler\w*_backward|upsample_\w+_backward|reflection_pad\dd_backward|\w*(avg|max)_pool\w*_backward|bincount_weighted"
)


def name_of(func: Any) -> str:
    """The operation's name, without its overload."""
    return str(func._schema.name.split("::")[1])


def waits(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for an operation on CUDA tensors."""
    if name in ("index", "index_put_", "_index_put_impl_"):
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and (
            name == "index" or args[2].numel() != 1
        )  # a mask that is filled with one value is converted to `where`
    return name in WAITS


def is_unordered(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the result of an operation depends on the order in which threads finish, whatever is switched on."""
    if name == "bincount":
        return len(args) > 1 and args[1] is not None  # a sum of floating point weights; counts are exact
    if name.startswith(("cumsum", "cumprod")):
        return bool(args[0].is_floating_point())
    if name == "histc":
        return bool(args[0].is_floating_point())
    return bool(UNORDERED.fullmatch(name))


def is_unordered_unless_switched(name: str, args: tuple[Any, ...]) -> bool:
    """The same, but for the switch.

    Places that are written once each have nothing to be ordered; `args` hold CPU values.
    """
    if not SWITCHED.fullmatch(name):
        return False
    if name.startswith("index_put") or name == "_index_put_impl_":
        accumulates = len(args) > 3 and bool(args[3])  # sorted first, on CUDA
        return not accumulates and _repeats(_flat(args[0], args[1]))
    if name.startswith(("index_add", "index_copy")):
        return _repeats(args[2])
    if name.startswith("scatter"):
        if name.rstrip("_") == "scatter" and not isinstance(args[3], Tensor):
            return False  # one value, whoever comes last
        places = torch.zeros(args[0].shape, dtype=torch.int64).scatter_add(args[1], args[2], torch.ones_like(args[2]))
        return bool((places > 1).any())
    return True


def _flat(target: Tensor, indices: Any) -> Tensor:
    """One number for each place that is written; masks name each place once."""
    if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
        return torch.zeros(0, dtype=torch.int64)
    shape = torch.broadcast_shapes(*(x.shape for x in indices if x is not None))
    flat = torch.zeros(shape, dtype=torch.int64)
    for size, index in zip(target.shape, indices, strict=False):
        if index is not None:
            flat = flat * size + index.long() % size
    return flat


def _repeats(places: Tensor) -> bool:
    return places.unique().numel() < places.numel()


def divides_by_a_number(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether CUDA multiplies by a reciprocal instead: of a divisor that the host holds, in a true division."""
    if name not in ("div", "div_") or kwargs.get("rounding_mode") or not args[0].is_floating_point():
        return False
    return not (isinstance(args[1], Tensor) and args[1].is_cuda)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """Float32 with the 11 significant bits that TF32 keeps of a factor."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

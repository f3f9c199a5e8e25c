"""Tensors in aligned memory, where equal weights give equal bits.

Some matrix-vector products of CPU libraries take another order of summation when an operand does not begin at a multiple of the
vector width: the last bits then depend on where a weight lies. safetensors maps a file into memory, so a weight begins
wherever the file's header leaves it. PyTorch's own allocator aligns, so a copy of what lies elsewhere is enough.
"""

from torch import Tensor, nn

ALIGNMENT = 64  # bytes: what PyTorch's CPU allocator gives, and the width of an AVX-512 register


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at a multiple of ALIGNMENT; always True of what is empty or lies on another device than a CPU."""
    return tensor.device.type != "cpu" or not tensor.numel() or tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: Tensor) -> Tensor:
    """The same values at an aligned address: `tensor` itself, or a copy if it begins elsewhere."""
    return tensor if is_aligned(tensor) else tensor.clone()


def align(model: nn.Module) -> int:
    """Move every parameter and buffer of `model` to aligned memory, in place and one at a time; ties stay ties.

    Returns:
        Bytes that were copied; the memory that they came from is free as soon as nothing else refers to it.
    """
    copies: dict[tuple[object, ...], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_aligned(tensor):
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in copies:
                copies[place] = tensor.detach().clone()
            tensor.data = copies[place]
    return sum(copy.nbytes for copy in copies.values())

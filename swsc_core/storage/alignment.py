"""Copies of tensors in aligned memory, so that equal weights give equal bits.

Some matrix-vector products of CPU libraries sum in another order if an operand does not begin at a multiple of the
vector width: the last bits of the result then depend on the address of the weight. safetensors maps a file into memory,
where a weight begins at any address that the file's header leaves. PyTorch's own allocator aligns, so a copy of a
misaligned tensor is enough.
"""

from torch import Tensor, nn

# Bytes: the alignment of PyTorch's CPU allocator, and the width of an AVX-512 register.
ALIGNMENT = 64


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins at a multiple of ALIGNMENT; True for an empty tensor and on any device but the CPU."""
    return tensor.device.type != "cpu" or not tensor.numel() or tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: Tensor) -> Tensor:
    """The same values at an aligned address: `tensor` itself if it is aligned, else a copy."""
    return tensor if is_aligned(tensor) else tensor.clone()


def align(model: nn.Module) -> int:
    """Move every parameter and buffer of `model` to aligned memory, in place and one at a time. Tied weights stay tied.

    Returns:
        Bytes that were copied. The memory of the originals is free when nothing else refers to it.
    """
    copies: dict[tuple[object, ...], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_aligned(tensor):
            identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if identity not in copies:
                copies[identity] = tensor.detach().clone()
            tensor.data = copies[identity]
    return sum(copy.nbytes for copy in copies.values())

"""Devices: full float32 precision, deterministic gradients, and errors after which a process cannot use its GPU."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.errors import ClusterError, RunError, SwscError, first_line
from swsc_core.storage.json_fields import JsonValue

# Messages of errors that leave the CUDA context, or a library that uses it, unusable for the rest of the process.
_BROKEN = re.compile(
    r"CUDA(?: driver| runtime)? error|CUDNN_STATUS|cuDNN error|CUBLAS_STATUS|cublas\w* (?:error|failed)"
    r"|CUSOLVER_STATUS|cusolver error|CUSPARSE_STATUS|NCCL error|HIP error|hip(?:blas|solver|blaslt)\w* error"
    r"|HIPBLAS_STATUS|HIPSOLVER_STATUS|rocblas_status|rocblas error|MIOpen error|miopenStatus|device-side assert"
    r"|illegal memory access|unspecified launch failure",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"(?:CUDA|HIP) (?:driver )?(?:error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
# Side of the matrix product that reveals TF32; large enough for tensor cores.
_PROBE_SIDE = 256
GPU_MEMORY_REMEDY = (
    "lower --batch-size or the length of windows, use larger GPUs or a larger --gpus-per-worker, or compute on CPUs by"
    " --gpus-per-worker 0"
)
# The values with which cuBLAS is deterministic.
_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# Read by cuBLAS and cuDNN themselves: torch neither sees it nor can switch it off.
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU ran out of memory. The process can still do smaller work."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return _is_runtime_error(error) and bool(_OUT_OF_MEMORY.search(str(error)))


def requires_new_process(error: BaseException) -> bool:
    """Return whether the GPU is unusable, or too full, for this process. The same task may succeed in a new process."""
    import torch

    if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return _is_runtime_error(error) and bool(_BROKEN.search(str(error)))


def _is_runtime_error(error: BaseException) -> bool:
    """Whether an error may stem from CUDA's libraries, which raise RuntimeError; SwscErrors may quote any text."""
    return isinstance(error, RuntimeError) and not isinstance(error, SwscError)


def fix_arithmetic(device: str) -> None:
    """Switch TF32 off, check that it is off, and make cuBLAS deterministic. No-op on a CPU.

    TF32 keeps 11 bits of every factor, which would silently spoil sums, distances and orthogonal bases.

    Raises:
        ClusterError: products are still rounded to TF32.
    """
    if device == "cpu":
        return
    import torch

    if os.environ.get(_TF32_OVERRIDE) not in (None, "", "0"):
        raise ClusterError(f"{_TF32_OVERRIDE} is set, so factors are rounded to 11 bits; unset it on every node")
    if os.environ.get(_WORKSPACE) not in _WORKSPACES:
        # cuBLAS reads it when it is first used.
        os.environ[_WORKSPACE] = _WORKSPACES[0]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # The smallest number above 1 in TF32 is 1 + 2**-10, so TF32 would round this value to 1.
    value = 1 + 2.0**-12
    ones = torch.eye(_PROBE_SIDE, device=device)
    if bool(((value * ones) @ ones != value * ones).any()):
        raise ClusterError(
            "this GPU rounds the factors of float32 products to TF32; unset NVIDIA_TF32_OVERRIDE and"
            " TORCH_ALLOW_TF32_CUBLAS_OVERRIDE on every node"
        )


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Make gradients deterministic on a GPU, where fused attention kernels add them up in no fixed order.

    No-op on a CPU.

    Raises:
        RunError: an operation of the model has no deterministic implementation on a GPU.
    """
    if device == "cpu":
        yield
        return
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1]))
        torch.use_deterministic_algorithms(True)
        stack.enter_context(ordered_scans(device))
        try:
            yield
        except RuntimeError as error:
            if not _is_runtime_error(error) or "deterministic" not in str(error):
                raise
            reason = first_line(error)
            raise RunError(
                f"gradients would differ from run to run on a GPU ({reason}); compute on CPUs by --gpus-per-worker 0"
            ) from None


def ordered_scans(device: str) -> AbstractContextManager[Any]:
    """Compute cumulative sums of floating-point values on a GPU as products with a triangular matrix of ones.

    Unlike torch.cumsum, such products add in a fixed order. Some models (OPT) count positions by cumulative sums.
    """
    if device == "cpu":
        return nullcontext()
    import torch
    from torch.overrides import TorchFunctionMode

    class Scans(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.cumsum, torch.Tensor.cumsum) and args[0].is_cuda and args[0].is_floating_point():
                return cumulative_sum(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    return Scans()


def cumulative_sum(values: Any, dim: int, *, dtype: Any = None) -> Any:
    """Equivalent to torch.cumsum for finite floating-point values, with a gradient.

    Args:
        values: tensor of any shape.
        dim: dimension along which values are summed.
        dtype: dtype of the result; None for that of `values`.
    """
    import torch

    wide = torch.float64 if torch.float64 in (dtype, values.dtype) else torch.float32
    rows = values.movedim(dim, -1).to(wide)
    ones = torch.ones(rows.shape[-1], rows.shape[-1], dtype=wide, device=values.device)
    return (rows @ ones.triu()).to(dtype or values.dtype).movedim(-1, dim)


@dataclass(frozen=True)
class Device:
    """The device of a worker.

    Attributes:
        kind: "cpu", or CUDA's name of the GPU model. Results of different kinds differ in their last bits.
        nbytes: memory of the GPU, or of the worker's share of one; 0 without a GPU.
        capability: vector instructions that torch's kernels use on the CPU.
    """

    kind: str = "cpu"
    nbytes: int = 0
    capability: str = ""


@dataclass(frozen=True)
class Arithmetic:
    """What the bytes of an output depend on besides its settings.

    Attributes:
        threads: CPU threads of a worker, which determine the last bit of LAPACK's results.
        device: kind of device of every worker: "cpu", or CUDA's name of the GPU model; None if it is not known yet.
    """

    threads: int
    device: str | None = "cpu"

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Entries of an output's identity. An unknown device is left out."""
        kind = {"device": self.device, "torch": version("torch").split("+")[0]} if self.device else {}
        return {"threads": self.threads, **kind}

    @property
    def gpu_identity(self) -> dict[str, JsonValue]:
        """Entries of a cache key.

        They are empty for a CPU, so that keys of results on CPUs stay as they have always been.
        """
        return {} if self.device == "cpu" else self.identity


def device_name(device: str) -> str:
    """Return the kind of a device: "cpu", or CUDA's name of the GPU model."""
    import torch

    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name(0))


def vector_instructions(device: str) -> str:
    """Return the vector instructions that torch uses on this machine's CPU or, for a GPU, its name."""
    import torch

    return torch.backends.cpu.get_cpu_capability() if device == "cpu" else device_name(device)


def take_device(gpus: float) -> tuple[str, Device]:
    """Return the device of a worker that Ray gave `gpus` GPUs: torch's name and a description.

    A worker with a fraction of a GPU can allocate only that fraction of its memory.

    Raises:
        ClusterError: there is a GPU, but torch cannot use it.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if not gpus or not torch.cuda.is_available():
        if gpus and os.path.exists("/dev/nvidiactl"):
            raise ClusterError(
                f"a worker has a GPU that its torch {torch.__version__} cannot use; install a CUDA build of torch on"
                " every node, or compute on CPUs by --gpus-per-worker 0"
            )
        return "cpu", Device(capability=capability)
    share = min(1.0, gpus)
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    total = torch.cuda.get_device_properties(0).total_memory
    return "cuda", Device(device_name("cuda"), int(share * total), capability)


def require_gpu_memory(needed: int, nbytes: int) -> None:
    """Raise ClusterError if a GPU of `nbytes` bytes is too small for an estimate of `needed` bytes. 0: no GPU."""
    if 0 < nbytes < needed:
        raise ClusterError(
            f"a task is estimated to need {needed / 1e9:.1f} GB of GPU memory, but a worker has {nbytes / 1e9:.1f} GB;"
            " use larger GPUs or a larger --gpus-per-worker, or compute on CPUs by --gpus-per-worker 0"
        )


def require_same_kind(expected: str | None, kind: str) -> str:
    """Return `kind` of device.

    Raise ClusterError if other workers have another one, `expected`, which rounds differently.
    """
    if expected is not None and kind != expected:
        raise ClusterError(
            f"workers have different devices, {expected} and {kind}, whose results differ in their last bits; use nodes"
            " of one kind for this run, or compute on CPUs by --gpus-per-worker 0"
        )
    return kind

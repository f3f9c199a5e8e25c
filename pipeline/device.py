"""What calculations on a GPU rest on: full float32 precision, one order of every sum, and errors that end a process told from others."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.errors import ClusterError, RunError, SwscError, first_line

# Words of errors after which a process can do nothing more on its GPU: the context is broken, or a library of it.
_BROKEN = re.compile(
    r"CUDA(?: driver| runtime)? error|CUDNN_STATUS|cuDNN error|CUBLAS_STATUS|cublas\w* (?:error|failed)|CUSOLVER_STATUS|cusolver error"
    r"|CUSPARSE_STATUS|NCCL error|HIP error|hip(?:blas|solver|blaslt)\w* error|HIPBLAS_STATUS|HIPSOLVER_STATUS|rocblas_status"
    r"|rocblas error|MIOpen error|miopenStatus|device-side assert|illegal memory access|unspecified launch failure",
    re.IGNORECASE,
)
_TOO_SMALL = re.compile(r"(?:CUDA|HIP) (?:driver )?(?:error: )?out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
_PROBE = 256  # side of the product by which TF32 shows: large enough for tensor cores
ROOM = "lower --batch-size or the length of windows, use larger GPUs or a larger --gpus-per-worker, or calculate on CPUs by --gpus-per-worker 0"
_WORKSPACE, _WORKSPACES = (
    "CUBLAS_WORKSPACE_CONFIG",
    (":4096:8", ":16:8"),
)  # with which cuBLAS gives the same bits each time
_TF32_BY_LIBRARY = "NVIDIA_TF32_OVERRIDE"  # read by cuBLAS and cuDNN themselves: torch cannot see it, nor switch it off


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU did not do; its process is sound, and may be given smaller work."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return _is_of_torch(error) and bool(_TOO_SMALL.search(str(error)))


def requires_new_process(error: BaseException) -> bool:
    """Whether a process can do nothing, or not enough, on its GPU after this: another one may, and it is no fault of the task."""
    import torch

    if is_out_of_memory(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):
        return True
    return _is_of_torch(error) and bool(_BROKEN.search(str(error)))


def _is_of_torch(error: BaseException) -> bool:
    """Errors of ours cite what they like; those of CUDA's libraries come as RuntimeErrors."""
    return isinstance(error, RuntimeError) and not isinstance(error, SwscError)


def fix_arithmetic(device: str) -> None:
    """Switch TF32 off, whoever switched it on, and make sure that it is off; products that are the same each time. Nothing on a CPU.

    TF32 keeps 11 bits of every factor: sums, distances and orthogonal bases would be wrong without a word.

    Raises:
        ClusterError: products are rounded all the same.
    """
    if device == "cpu":
        return
    import torch

    if os.environ.get(_TF32_BY_LIBRARY) not in (None, "", "0"):
        raise ClusterError(f"{_TF32_BY_LIBRARY} is set, which rounds factors to 11 bits; unset it on every node")
    if os.environ.get(_WORKSPACE) not in _WORKSPACES:
        os.environ[_WORKSPACE] = _WORKSPACES[0]  # read when cuBLAS is first used
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    value = 1 + 2.0**-12  # TF32 holds no more than 1 + 2**-10 beside one
    ones = torch.eye(_PROBE, device=device)
    if bool(((value * ones) @ ones != value * ones).any()):
        raise ClusterError(
            "products of float32 are rounded to fewer bits on this GPU (TF32); unset NVIDIA_TF32_OVERRIDE and"
            " TORCH_ALLOW_TF32_CUBLAS_OVERRIDE on every node"
        )


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Gradients that are the same each time: on a GPU the fused kernels of attention add theirs up in no fixed order.

    Nothing on a CPU, where they have one.

    Raises:
        RunError: something that has no order on a GPU.
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
            if not _is_of_torch(error) or "deterministic" not in str(error):
                raise
            reason = first_line(error)
            raise RunError(
                f"on a GPU its gradients would differ from run to run ({reason}): use --gpus-per-worker 0"
            ) from None


def ordered_scans(device: str) -> AbstractContextManager[Any]:
    """While entered, cumulative sums of floating point values on a GPU are products with a triangle of ones: those have an order.

    Some models count positions in such sums (OPT).
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
    """As torch.cumsum of finite floating point values, with a gradient."""
    import torch

    wide = torch.float64 if torch.float64 in (dtype, values.dtype) else torch.float32
    rows = values.movedim(dim, -1).to(wide)
    ones = torch.ones(rows.shape[-1], rows.shape[-1], dtype=wide, device=values.device)
    return (rows @ ones.triu()).to(dtype or values.dtype).movedim(-1, dim)


@dataclass(frozen=True)
class Device:
    """What a worker calculates with.

    Attributes:
        kind: "cpu", or the model of its GPU: bytes differ from kind to kind.
        nbytes: of the GPU, or of its share of one; 0: it has none.
        capability: the vector instructions that torch's kernels use on its CPU.
    """

    kind: str = "cpu"
    nbytes: int = 0
    capability: str = ""


@dataclass(frozen=True)
class Arithmetic:
    """What the bytes of an output depend on beside its settings.

    Attributes:
        threads: of a worker: LAPACK's last bit depends on their number.
        device: kind of the device of every worker; "cpu", or the model of its GPU; None: not known yet.
    """

    threads: int
    device: str | None = "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """What an output's identity says of it, as far as it is known."""
        kind = {"device": self.device, "torch": version("torch").split("+")[0]} if self.device else {}
        return {"threads": self.threads, **kind}

    @property
    def gpu_identity(self) -> dict[str, Any]:
        """What names in a cache say of it: nothing of CPUs, whose results have always been found again."""
        return {} if self.device == "cpu" else self.identity


def device_name(device: str) -> str:
    """The kind of a device: "cpu", or as CUDA calls the GPU."""
    import torch

    return "cpu" if device == "cpu" else str(torch.cuda.get_device_name(0))


def vector_instructions(device: str) -> str:
    """Vector instructions that torch uses on this machine's CPU, or as CUDA calls the GPU."""
    import torch

    return torch.backends.cpu.get_cpu_capability() if device == "cpu" else device_name(device)


def take_device(gpus: float) -> tuple[str, Device]:
    """torch's name of the device of a worker that was given `gpus` of a GPU, and what is known of it. Its share is all it can take.

    Raises:
        ClusterError: there is a GPU, and torch cannot use it.
    """
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if not gpus or not torch.cuda.is_available():
        if gpus and os.path.exists("/dev/nvidiactl"):
            raise ClusterError(
                f"a worker was given a GPU that its torch {torch.__version__} cannot use; install a build for CUDA on every node,"
                " or calculate on CPUs by --gpus-per-worker 0"
            )
        return "cpu", Device(capability=capability)
    share = min(1.0, gpus)
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    total = torch.cuda.get_device_properties(0).total_memory
    return "cuda", Device(device_name("cuda"), int(share * total), capability)


def require_gpu_memory(needed: int, nbytes: int) -> None:
    """Raise ClusterError if a GPU of `nbytes` bytes (0: none) is too small for the estimate."""
    if 0 < nbytes < needed:
        raise ClusterError(
            f"a task is estimated to need {needed / 1e9:.1f} GB of a GPU, a worker has {nbytes / 1e9:.1f} GB of one; use larger"
            " GPUs or a larger --gpus-per-worker, or --gpus-per-worker 0 to calculate on CPUs"
        )


def require_same_kind(wanted: str | None, kind: str) -> str:
    """The kind of device of all workers; ClusterError for one that has another: their bytes would differ."""
    if wanted is not None and kind != wanted:
        raise ClusterError(
            f"workers on unlike devices, {wanted} and {kind}: an output would hold bytes of two kinds; let the cluster have nodes of"
            " one kind for this run, or calculate on CPUs by --gpus-per-worker 0"
        )
    return kind

"""Errors of a GPU are distinguished from others; kinds of devices; the arithmetic in an identity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.compression import job as compression
from pipeline.compression.job import CompressionVariant
from pipeline.device import (
    Arithmetic,
    cumulative_sum,
    deterministic,
    fix_arithmetic,
    is_out_of_memory,
    require_gpu_memory,
    require_same_kind,
    requires_new_process,
)
from pipeline.engine.local_pool import LocalPool
from pipeline.engine.ray_backend.arithmetic import arithmetic_of
from pipeline.engine.ray_backend.cluster import WorkerResources, require_one_gpu_type
from pipeline.engine.task import JobContext, JobOutput, Task, as_swsc_error
from pipeline.engine.worker import Worker
from pipeline.errors import CheckpointError, ClusterError, OutputError, RunError
from pipeline.models.matrix_reader import SourceMatrix
from pipeline.models.meta_loading import loading_errors
from pipeline.outputs import existing_output
from pipeline.settings.cluster import ClusterSettings
from pipeline.storage.cache_key import run_digest
from pipeline.storage.store import Store

BROKEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
    torch.AcceleratorError("HIP error: invalid device function", 98),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd`"),
    RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, ...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:123, unhandled cuda error"),
    RuntimeError("HIP error: an illegal memory access was encountered"),
    RuntimeError("rocblas_status_internal_error"),
    RuntimeError("CUDA driver error: unknown error"),
]
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.OutOfMemoryError("HIP out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
HARMLESS: list[Exception] = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    torch.linalg.LinAlgError("linalg.cholesky: The factorization could not be completed"),
    ValueError("CUDA error"),
    CheckpointError("model: its README speaks of a CUDA error"),
]


@pytest.mark.parametrize("error", [*BROKEN, *FULL], ids=str)
def test_an_error_of_the_gpu_needs_a_fresh_process(error: Exception) -> None:
    assert requires_new_process(error)
    assert is_out_of_memory(error) == (error in FULL)


@pytest.mark.parametrize("error", HARMLESS, ids=str)
def test_an_error_of_the_task_itself_needs_no_fresh_process(error: Exception) -> None:
    assert not requires_new_process(error)


def test_a_gpu_that_is_too_small_is_an_error_and_a_missing_one_is_not() -> None:
    require_gpu_memory(8_000_000_000, 8_000_000_000)
    require_gpu_memory(8_000_000_000, 0)
    with pytest.raises(ClusterError, match=r"8\.0 GB .* 6\.0 GB"):
        require_gpu_memory(8_000_000_000, 6_000_000_000)


def test_out_of_memory_is_a_failure_of_the_task_and_names_the_remedy() -> None:
    found = as_swsc_error(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nmore"), "layer 3")
    assert isinstance(found, RunError)
    assert str(found).startswith("layer 3: ")
    assert "--gpus-per-worker 0" in str(found)


@dataclass(frozen=True)
class Fail:
    error: Exception

    def run(self, context: JobContext) -> JobOutput[None]:
        raise self.error


@pytest.mark.parametrize("error", [BROKEN[0], BROKEN[3]], ids=str)
def test_a_run_of_one_process_ends_with_its_gpu(error: Exception) -> None:
    pool = LocalPool(Worker(1, "cpu"))
    pool.start(0, Task("a", Fail(error), "layer 3"))
    with pytest.raises(RunError, match="layer 3"):
        pool.wait()


@pytest.mark.parametrize("error", [FULL[0], HARMLESS[0]], ids=str)
def test_a_run_of_one_process_goes_on_after_other_errors(error: Exception) -> None:
    pool = LocalPool(Worker(1, "cpu"))
    pool.start(0, Task("a", Fail(error), "layer 3"))
    done = pool.wait()
    assert done is not None
    assert isinstance(done.error, RunError)


@pytest.mark.parametrize("error", [BROKEN[0], FULL[0]], ids=str)
def test_a_sweep_does_not_take_an_error_of_the_gpu_for_one_of_a_variant(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = SourceMatrix(
        whole_matrix(TensorInfo("w", "F32", (2, 2), "model.safetensors", 0, 16)), "", torch.ones(2, 2), 0.0, {}
    )

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(compression, "encode", fail)
    with pytest.raises(RuntimeError):
        compression.compress_variant(matrix, CompressionVariant((), 0), "cpu")
    monkeypatch.setattr(compression, "encode", lambda *_, **__: (_ for _ in ()).throw(ValueError("too few rows")))
    failure, _ = compression.compress_variant(matrix, CompressionVariant((), 0), "cpu")
    assert failure == compression.CompressionFailure("w", "w: too few rows")


def test_a_cpu_is_left_as_it_is() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.flash_sdp_enabled()
    fix_arithmetic("cpu")
    with deterministic("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() == before[1]
    assert torch.get_float32_matmul_precision() == before[0]


def test_gradients_on_a_gpu_come_from_kernels_of_one_order_and_all_is_as_before_afterwards() -> None:
    with deterministic("cuda"):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cumulative_sum_in_order_is_that_of_torch(dim: int, dtype: torch.dtype) -> None:
    values = torch.randint(-4, 5, (6, 9)).to(dtype).requires_grad_()
    ours, theirs = cumulative_sum(values, dim), values.cumsum(dim)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    weight = torch.randint(-4, 5, (6, 9)).to(dtype)
    one, other = (torch.autograd.grad((sums * weight).sum(), values)[0] for sums in (ours, theirs))
    assert torch.equal(one, other)


def test_a_nondeterministic_operation_on_a_gpu_is_an_error_with_a_remedy() -> None:
    with pytest.raises(RunError, match=r"histc.*--gpus-per-worker 0"), deterministic("cuda"):
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set ...\nmore")
    with pytest.raises(RuntimeError, match="shapes"), deterministic("cuda"):
        raise RuntimeError("shapes cannot be multiplied")


def test_tf32_that_torch_cannot_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(ClusterError, match="NVIDIA_TF32_OVERRIDE"):
        fix_arithmetic("cuda")
    fix_arithmetic("cpu")


def test_workers_on_unlike_devices_are_refused() -> None:
    assert require_same_kind(None, "cpu") == "cpu"
    assert require_same_kind("NVIDIA H200", "NVIDIA H200") == "NVIDIA H200"
    for kind in ("cpu", "NVIDIA A100-SXM4-80GB"):
        with pytest.raises(ClusterError, match="NVIDIA H200 and"):
            require_same_kind("NVIDIA H200", kind)


def test_a_cluster_with_gpus_of_two_models_requires_a_choice() -> None:
    nodes = [{"CPU": 8, "GPU": 1, f"accelerator_type:{model}": 1.0} for model in ("A100", "L4")]
    with pytest.raises(ClusterError, match=r"A100, L4.*--gpu-type"):
        require_one_gpu_type(WorkerResources(1, 1), nodes)
    require_one_gpu_type(WorkerResources(1, 1), nodes[:1])
    require_one_gpu_type(WorkerResources(1, 1), [{"CPU": 8, "GPU": 1}, *nodes[:1]])  # one that Ray has no name for
    chosen = WorkerResources(1, 1, gpu_type="L4")
    require_one_gpu_type(chosen, nodes)
    assert [chosen.fitting(node) for node in nodes] == [0, 1]
    assert chosen.options()["resources"] == {"accelerator_type:L4": 0.001}


@pytest.mark.parametrize("gpus", [1.5, 2, 8])
def test_several_gpus_a_worker_are_refused(gpus: float) -> None:
    with pytest.raises(ValidationError, match="one GPU at most"):
        ClusterSettings(gpus_per_worker=gpus)


def test_cpus_need_no_probe() -> None:
    assert arithmetic_of(ClusterSettings(gpus_per_worker=0, cpus_per_worker=2)) == Arithmetic(2, "cpu")
    assert arithmetic_of(ClusterSettings(local=True, gpus_per_worker=0)).identity["device"] == "cpu"


class TestIdentity:
    SETTINGS: ClassVar = {"bits": 3, "threads": 1}

    def begun(self, path: Path, **about: str) -> Store:
        store = Store.at(str(path))
        store.write_json(existing_output.RUN, {**self.SETTINGS, **about})
        return store

    def test_what_was_begun_on_another_device_is_not_gone_on_with(self, tmp_path: Path) -> None:
        store = self.begun(tmp_path, device="NVIDIA H200", torch="2.13.0")
        here = {**self.SETTINGS, "device": "cpu", "torch": "2.13.0"}
        with pytest.raises(OutputError, match="device 'NVIDIA H200' -> 'cpu'"):
            existing_output.require_replaceable(store, here, overwrite=False)
        existing_output.require_replaceable(store, here, overwrite=True)
        existing_output.require_replaceable(store, self.SETTINGS, overwrite=False)  # not known yet

    def test_what_another_torch_began_is_not_gone_on_with(self, tmp_path: Path) -> None:
        store = self.begun(tmp_path, device="cpu", torch="2.12.0")
        with pytest.raises(OutputError, match=r"torch '2\.12\.0' -> '2\.13\.0'"):
            existing_output.require_replaceable(store, {**self.SETTINGS, "device": "cpu", "torch": "2.13.0"}, False)

    def test_what_an_earlier_version_began_is_gone_on_with(self, tmp_path: Path) -> None:
        store, here = self.begun(tmp_path), {**self.SETTINGS, "device": "cpu", "torch": "2.13.0"}
        existing_output.require_replaceable(store, here, overwrite=False)
        assert run_digest(here) == run_digest(self.SETTINGS)  # its records are found again

    def test_other_settings_are_reported_first(self, tmp_path: Path) -> None:
        store = self.begun(tmp_path, device="cpu")
        with pytest.raises(OutputError, match="bits 3 -> 4"):
            existing_output.require_replaceable(store, {"bits": 4, "threads": 1, "device": "NVIDIA H200"}, False)

    def test_names_in_a_cache_do_not_depend_on_cpus(self) -> None:
        assert Arithmetic(1).gpu_identity == {}
        assert Arithmetic(1, "NVIDIA H200").gpu_identity["device"] == "NVIDIA H200"


@pytest.mark.parametrize("error", [FULL[0], BROKEN[0]], ids=str)
def test_a_gpu_that_fails_while_a_model_is_loaded_does_not_blame_the_checkpoint(error: Exception) -> None:
    with pytest.raises(RuntimeError), loading_errors("model"):
        raise error
    with pytest.raises(CheckpointError), loading_errors("model"):
        raise RuntimeError("size mismatch for lm_head")

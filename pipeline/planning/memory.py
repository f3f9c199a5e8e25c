"""Predicted peak memory of a worker in each stage of a command.

A worker on a CPU holds everything in its resident memory. A worker on a GPU holds weights, activations and sums there;
its host memory needs room for loading only. benchmarks/memory_plans.py compares the predictions with measured peaks.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.engine.memory import CUDA, GPU, WorkerMemory
from pipeline.models.stored_model import Model
from pipeline.planning.model_sizes import ModelSizes
from pipeline.planning.plan import Plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.matrix import MatrixSettings
from swsc_core.method.segmentation import GPU_SLAB_WEIGHTS
from swsc_core.method.spec import Spec

# A worker that holds no weights: Python, torch, transformers, Ray and one model class
# (`python -m benchmarks.memory_plans --base`). On a GPU also CUDA's libraries and context.
WORKER_BASE = WorkerMemory(cpu=450 << 20) + WorkerMemory(host=450 << 20) + CUDA
# Bytes of cuBLAS's workspace per thread on a GPU, as pipeline/device.py configures it (:4096:8). A backward pass runs
# in a thread of its own.
_CUBLAS = 32 << 20
# Float32 copies of a matrix that are alive at the peak of its compression (benchmarks/memory.py,
# benchmarks/llama7b_shape.py). K-Means of whole channels also holds their Gram matrix; segments are processed in slabs.
_WHOLE, _SEGMENTED = 8, 4
# Copies of a slab on a GPU, where the slab may be the whole matrix.
_SLAB_COPIES = 5
# The Hessian of a matrix and its root.
_HESSIANS = 2
# Copies of a fused tensor that are alive while its matrices are assembled and transposed.
_FUSED_COPIES = 2
# Bytes per value of an fp8 tensor that is dequantized: as read, in aligned memory, and in bfloat16, with the scales.
_DEQUANTIZED_BYTES = 6
# Positions whose logits are converted to float32 at a time (pipeline/evaluation/perplexity.py).
_POSITIONS = 512


def stage_memory(
    model: Model, plan: Plan, settings: MatrixSettings, calibration: CalibrationSettings
) -> dict[str, WorkerMemory]:
    """Return what a worker needs in each stage of a compression, by the name of the stage.

    It is needed before the first stage, so that a stage which does not fit is reported at once.
    """
    stages = {"compress": layer_compression_memory(plan)}
    seqlen, dtype = calibration.calibration_seqlen, calibration.calibration_dtype
    if settings.needs_hessians:
        sums = hessian_bytes([decision.matrix for decision in plan.compressed])
        stages["calibrate"] = calibration_memory(model, seqlen, min(sums, int(calibration.moment_gib * 2**30)), dtype)
    if settings.epochs:
        stages["tune"] = tuning_memory(model, seqlen, dtype)
    return stages


def hessian_bytes(infos: Iterable[MatrixInfo]) -> int:
    """Return the bytes of the float32 Hessians of some matrices.

    Each matrix has a weighted Hessian. An unweighted one is shared by two matrices of the same layer and input width; a
    single matrix, such as `down`, has its own.
    """
    counts = Counter((layer_of(info.name), info.shape[1]) for info in infos)
    return sum(4 * width**2 * (count + -(-count // 2)) for (_, width), count in counts.items())


def compression_memory(plan: Plan) -> WorkerMemory:
    """Return what a worker needs that compresses the matrices of `plan` one at a time."""
    matrices = [(decision.matrix, spec) for decision in plan.compressed for spec in decision.specs]
    largest = max(4 * info.count for info, _ in matrices)
    peak = 4 * max(_peak_values(info, spec) for info, spec in matrices)
    device = max(matrix_device_bytes(info, spec) for info, spec in matrices)
    return WORKER_BASE + WorkerMemory(peak, largest, device)


def layer_compression_memory(plan: Plan) -> WorkerMemory:
    """Return `compression_memory` with that of the largest file, which stays in host memory until it is complete."""
    fused = [tensor.tensor.nbytes for layer in plan.layers for tensor in layer.fused] if plan.dense else []
    collected = plan.largest_file_bytes + _FUSED_COPIES * max(fused, default=0)
    return compression_memory(plan) + WorkerMemory(cpu=collected, host=collected)


def copying_memory(plan: Plan) -> WorkerMemory:
    """Return what a worker on a CPU needs that copies tensors. It holds dequantized tensors only."""
    dequantized = [info.count for copy in plan.copies for info in copy.infos if info.fp8]
    return WORKER_BASE + WorkerMemory(cpu=_DEQUANTIZED_BYTES * max(dequantized, default=0))


def matrix_device_bytes(info: MatrixInfo, spec: Spec) -> int:
    """Return the bytes of a GPU that the compression of one matrix takes, besides those of `WORKER_BASE`."""
    slab_copies = _SLAB_COPIES * min(info.count, GPU_SLAB_WEIGHTS) if spec.cuts_channels else 0
    return _CUBLAS + 4 * (_peak_values(info, spec) + slab_copies)


def _peak_values(info: MatrixInfo, spec: Spec) -> int:
    count, inputs = info.count, info.shape[1]
    hessians = _HESSIANS * inputs**2 if spec.needs_hessian else 0
    return (_SEGMENTED if spec.cuts_channels else _WHOLE) * count + hessians


def restoring_memory(largest: int, file_bytes: int) -> WorkerMemory:
    """Return what a worker on a CPU needs that restores matrices one at a time.

    Args:
        largest: weights of the largest matrix, or of the largest tensor that is assembled from several.
        file_bytes: bytes of the largest restored file, whose tensors are collected in memory.
    """
    return WORKER_BASE + WorkerMemory(cpu=4 * _WHOLE * largest + file_bytes)


def evaluation_memory(model: Model, dtype: str, tokens: int) -> WorkerMemory:
    """Return what a worker needs that holds a whole model and runs it forward.

    Args:
        model: the model.
        dtype: dtype of the computation, by torch's name, or "auto".
        tokens: tokens of a batch.
    """
    return _whole_model(model, dtype, lambda value_bytes: _forward_bytes(model, tokens, value_bytes))


def block_memory(model: Model, dtype: str, tokens: int, shard_tokens: int) -> WorkerMemory:
    """Return what a worker needs that runs a model forward in blocks, besides the weights of a block.

    That is one layer's activations, the logits of a batch, and the hidden states of a shard before and after a block.

    Args:
        model: the model.
        dtype: dtype of the computation, by torch's name, or "auto".
        tokens: tokens of a batch.
        shard_tokens: tokens of all batches of a task.
    """

    def working(kind: str) -> int:
        value_bytes = bytes_of_value(model, dtype, kind)
        return _forward_bytes(model, tokens, value_bytes) + hidden_bytes(model, shard_tokens, value_bytes)

    host = hidden_bytes(model, shard_tokens, bytes_of_value(model, dtype, GPU))
    return WORKER_BASE + WorkerMemory(working("cpu"), host, _CUBLAS + working(GPU))


def hidden_bytes(model: Model, tokens: int, value_bytes: int) -> int:
    """Return the bytes of the hidden states of some tokens before and after a block."""
    return 2 * tokens * ModelSizes.of(model.config).width * value_bytes


def calibration_memory(model: Model, seqlen: int, sum_bytes: int, dtype: str) -> WorkerMemory:
    """Return what a worker needs that holds a whole model and sums up Hessians in backward passes.

    Args:
        model: the model.
        seqlen: tokens of a window.
        sum_bytes: bytes of the Hessians that are summed in one pass. They are copied to host memory at its end.
        dtype: dtype of the computation, by torch's name, or "auto".
    """
    memory = _whole_model(model, dtype, lambda value_bytes: _backward_bytes(model, seqlen) + sum_bytes)
    return memory + _gpu_gradients(model, seqlen) + WorkerMemory(host=sum_bytes)


def block_gradient_memory(model: Model, seqlen: int, windows: int) -> WorkerMemory:
    """Return what a worker needs that calibrates in blocks, besides the block, its sums and its activations.

    That is five copies of the logits of one window, and the hidden states of `windows` windows and their gradients,
    before and after the block.
    """
    sizes = ModelSizes.of(model.config)
    hidden = 4 * seqlen * 4 * windows * sizes.width
    working = 4 * seqlen * 5 * sizes.vocabulary + hidden
    return WORKER_BASE + WorkerMemory(working, hidden, 2 * _CUBLAS + working)


def layer_activation_bytes(model: Model, seqlen: int) -> int:
    """Return the bytes of the activations of one layer that the backward pass of one window needs."""
    sizes = ModelSizes.of(model.config)
    return 4 * (sizes.backward(seqlen) + sizes.attention(seqlen)) // max(1, sizes.layers)


def tuning_memory(model: Model, seqlen: int, dtype: str) -> WorkerMemory:
    """Return what a worker needs that tunes: the original, the compressed model dense, and its stored parts.

    Args:
        model: the original.
        seqlen: tokens of a window.
        dtype: dtype of the computation, by torch's name, or "auto".
    """
    # Labels of segments of four weights as int32, the stored values, their gradients and the state of Adam.
    stored = 2 * model.weights
    # The gradient of a dense matrix, its restored weight and the old one.
    largest = max(model.count(name) for name in model.names)

    def working(value_bytes: int) -> int:
        return _backward_bytes(model, seqlen) + value_bytes * model.weights + stored + 8 * largest

    return _whole_model(model, dtype, working) + _gpu_gradients(model, seqlen)


def bytes_of_value(model: Model, dtype: str, kind: str) -> int:
    """Return the bytes of a weight on a device of `kind`.

    "auto" is float32 on a CPU; on a GPU it stands for the dtype that most bytes of the checkpoint have.
    """
    if dtype != "auto":
        return 4 if dtype == "float32" else 2
    if kind == "cpu":
        return 4
    return max(2, -(-dense_bytes(model) // model.weights)) if model.weights else 2


def dense_bytes(model: Model) -> int:
    """Return the bytes of all tensors of a model, dense, in the dtypes of the checkpoint."""
    return sum(map(model.nbytes, model.names))


def _whole_model(model: Model, dtype: str, working: Callable[[int], int]) -> WorkerMemory:
    """The memory of a whole model; `working` returns the bytes besides the weights, from the bytes of a value.

    On a CPU, tensors that are converted to another dtype are in memory twice while the model is loaded.
    """
    cpu, gpu = (bytes_of_value(model, dtype, kind) for kind in ("cpu", GPU))
    stacked = 2 * ModelSizes.of(model.config).expert_stack * cpu
    converted = sum(map(model.nbytes, _converted(model, cpu)))
    return WORKER_BASE + WorkerMemory(
        cpu=model.weights * cpu + max(converted + stacked, working(cpu)),
        host=_loading_bytes(model, gpu),
        device=_CUBLAS + model.weights * gpu + working(gpu),
    )


def _loading_bytes(model: Model, value_bytes: int) -> int:
    """Bytes of host memory that loading takes before the weights move to a GPU.

    Pages of mapped files are reclaimed when memory is short, so that one file has to fit. Tensors that are not in local
    dense files, and those that are converted to another dtype, are in host memory at once.
    """
    checkpoint = model.checkpoint
    converted = value_bytes * sum(map(model.count, _converted(model, value_bytes)))
    if not checkpoint.store.is_local or model.entries or any(info.fp8 for info in checkpoint.tensors.values()):
        return dense_bytes(model) + converted
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        sizes[info.file] += info.nbytes
    return max(sizes.values(), default=0) + converted


def _converted(model: Model, value_bytes: int) -> list[str]:
    """Tensors that are stored in another dtype than that of the computation."""
    return [name for name in model.names if model.nbytes(name) != value_bytes * model.count(name)]


def _forward_bytes(model: Model, tokens: int, value_bytes: int) -> int:
    """Bytes of one layer's activations, and of the logits. Some positions have a float32 copy and its logarithms."""
    sizes = ModelSizes.of(model.config)
    logits = sizes.vocabulary * (tokens * value_bytes + 8 * min(tokens, _POSITIONS))
    return sizes.forward(tokens) * value_bytes + logits


def _backward_bytes(model: Model, seqlen: int) -> int:
    """Bytes of the activations of a window that a backward pass needs, and of five float32 copies of the logits."""
    sizes = ModelSizes.of(model.config)
    return 4 * (sizes.backward(seqlen) + 5 * seqlen * sizes.vocabulary)


def _gpu_gradients(model: Model, seqlen: int) -> WorkerMemory:
    """What deterministic gradients take of a GPU besides."""
    return WorkerMemory(device=_CUBLAS + 4 * ModelSizes.of(model.config).attention(seqlen))

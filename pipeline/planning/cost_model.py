"""Cost model: predicted bytes, bits and peak memory of a worker."""

import math
from collections import Counter
from collections.abc import Iterable

from pipeline.architectures.model_config import find_number
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.models.stored_model import Model
from pipeline.planning.machine_speed import Speed
from pipeline.planning.plan import Plan
from pipeline.planning.time_model import core_seconds, stream_seconds, wall_seconds
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.matrix import MatrixSettings
from swsc_core.method.segmentation import GPU_SLAB_WEIGHTS
from swsc_core.method.spec import Spec

# Bytes of a worker that holds no weights: Python, torch, transformers, Ray.
WORKER_BASE = 450 << 20
# Bytes of cuBLAS's workspace per thread on a GPU, as pipeline/device.py configures it (:4096:8).
_CUBLAS = 32 << 20
# Float32 copies of a matrix that are alive at the peak of its compression (benchmarks/memory.py,
# benchmarks/llama7b_shape.py). K-Means of whole channels also holds their Gram matrix; segments are processed in slabs.
_WHOLE, _SEGMENTED = 8, 4
# Copies of a slab on a GPU, where the slab may be the whole matrix.
_SLAB_COPIES = 5
# Copies of a fused tensor that are alive while its matrices are assembled and transposed.
_FUSED_COPIES = 2
# Bytes per value of an fp8 tensor that is dequantized: as read, in aligned memory, and in bfloat16, with the scales.
_DEQUANTIZED_BYTES = 6
# The Hessian of a matrix and its root.
_HESSIANS = 2


def estimate_cost(plan: Plan, form: str, speed: Speed, workers: int) -> dict[str, float]:
    """Estimate the cost of a compression, without the seconds of the stages in `stage_seconds.py`.

    Args:
        plan: what is compressed and how.
        form: output format, "swsc" or "dense".
        speed: speed of one core.
        workers: number of workers.

    Returns:
        The numbers that `swsc plan` prints: bytes, bits per weight, and seconds, by the keys of its JSON file.
    """
    compressed = sum(decision.stored_bytes for decision in plan.compressed)
    count = sum(decision.info.count for decision in plan.compressed)
    return {
        "output_bytes": plan.stored_bytes_as(form),
        "compressed_bits_per_weight": 8 * compressed / count,
        "whole_model_bits_per_weight": 8 * plan.stored_bytes / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
        "worker_peak_bytes": layer_compression_bytes(plan),
        "of_which_on_a_gpu": device_bytes(plan),
        "core_seconds": core_seconds(plan, speed) + stream_seconds(plan, form, speed),
        "workers": workers,
        "seconds": wall_seconds(plan, form, speed, workers),
    }


def stage_bytes(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, calibration: CalibrationSettings
) -> dict[str, int]:
    """Return the peak memory of a worker in each stage of a compression, in bytes, by the name of the stage.

    It is needed before the first stage, so that a stage which does not fit is reported at once.
    """
    stages = {"compress": layer_compression_bytes(plan)}
    if settings.needs_hessians:
        sums = hessian_bytes([decision.matrix for decision in plan.compressed])
        per_pass = min(sums, int(calibration.moment_gib * 2**30))
        stages["calibrate"] = calibration_bytes(source, calibration.calibration_seqlen, per_pass)
    if settings.epochs:
        stages["tune"] = tuning_bytes(source, calibration.calibration_seqlen)
    return stages


def cached_bytes(plan: Plan, settings: MatrixSettings) -> int:
    """Return the bytes of cached files next to the output: Hessians, and the compressed model before tuning."""
    hessians = hessian_bytes(decision.matrix for decision in plan.compressed) if settings.needs_hessians else 0
    return hessians + (plan.stored_bytes_as("swsc") if settings.epochs else 0)


def hessian_bytes(infos: Iterable[MatrixInfo]) -> int:
    """Return the bytes of the float32 Hessians of some matrices.

    Each matrix has a weighted Hessian. An unweighted one is shared by two matrices of the same layer and input width; a
    single matrix, such as `down`, has its own.
    """
    counts = Counter((layer_of(info.name), info.shape[1]) for info in infos)
    return sum(4 * width**2 * (count + -(-count // 2)) for (_, width), count in counts.items())


def compression_bytes(plan: Plan) -> int:
    """Return the peak memory of a worker that compresses the matrices of `plan` one at a time, in bytes."""
    return WORKER_BASE + 4 * max(
        _peak_values(decision.matrix, spec) for decision in plan.compressed for spec in decision.specs
    )


def layer_compression_bytes(plan: Plan) -> int:
    """Return `compression_bytes` with those of the largest file, which a worker holds until it is complete."""
    fused = [tensor.tensor.nbytes for layer in plan.layers for tensor in layer.fused] if plan.dense else []
    return compression_bytes(plan) + plan.largest_file_bytes + _FUSED_COPIES * max(fused, default=0)


def copying_bytes(plan: Plan) -> int:
    """Return the peak memory of a worker that copies tensors, in bytes. It holds dequantized tensors only."""
    dequantized = [info.count for copy in plan.copies for info in copy.infos if info.fp8]
    return WORKER_BASE + _DEQUANTIZED_BYTES * max(dequantized, default=0)


def device_bytes(plan: Plan) -> int:
    """Return the part of `compression_bytes` on a GPU, if the worker has one."""
    return max(matrix_device_bytes(decision.matrix, spec) for decision in plan.compressed for spec in decision.specs)


def matrix_device_bytes(info: MatrixInfo, spec: Spec) -> int:
    """Return the bytes of a GPU that the compression of one matrix takes."""
    slab_copies = _SLAB_COPIES * min(info.count, GPU_SLAB_WEIGHTS) if spec.cuts_channels else 0
    return _CUBLAS + 4 * (_peak_values(info, spec) + slab_copies)


def _peak_values(info: MatrixInfo, spec: Spec) -> int:
    count, inputs = info.count, info.shape[1]
    hessians = _HESSIANS * inputs**2 if spec.needs_hessian else 0
    return (_SEGMENTED if spec.cuts_channels else _WHOLE) * count + hessians


def restoring_bytes(model: Model, file_bytes: int) -> int:
    """Return the peak memory of a worker that restores the matrices of `model` one at a time, in bytes.

    Fused tensors are assembled and transposed in memory. A file of at most `file_bytes` is held until it is complete.
    """
    largest = max(math.prod(entry.shape) for entry in model.entries.values())
    fused = max(map(model.nbytes, model.pieces), default=0)
    return WORKER_BASE + 4 * _WHOLE * largest + _FUSED_COPIES * fused + file_bytes


def evaluation_bytes(model: Model, dtype: str, tokens: int) -> int:
    """Return the peak memory of a worker that evaluates `model` on a CPU, in bytes.

    That is the weights as stored and in the dtype of the computation, and the logits of a batch with their float32
    copy.

    Args:
        model: the model.
        dtype: dtype of the computation, by torch's name.
        tokens: tokens of a batch.
    """
    value_bytes = 2 if dtype in ("float16", "bfloat16") else 4
    logits = tokens * (find_number(model.config, "vocab_size") or 0) * (value_bytes + 4)
    return WORKER_BASE + model.weights * (2 + value_bytes) + logits


def calibration_bytes(source: Checkpoint, seqlen: int, sum_bytes: int) -> int:
    """Return the peak memory of a worker that calibrates, in bytes.

    That is the weights in float32, the sums, the activations of one window that the backward pass needs, and five
    copies of the logits.

    Args:
        source: the model.
        seqlen: tokens of a window.
        sum_bytes: bytes of the Hessians that are summed in one pass.
    """
    keys = ("num_hidden_layers", "hidden_size", "vocab_size")
    layers, width, vocabulary = (find_number(source.config, key) or 0 for key in keys)
    activations = seqlen * layers * 24 * width
    return WORKER_BASE + 6 * source.weights + sum_bytes + 4 * (activations + 5 * seqlen * vocabulary)


def evaluation_device_bytes(model: Model, dtype: str, tokens: int) -> int:
    """Return the part of `evaluation_bytes` on a GPU: weights in the dtype of the computation, and logits."""
    value_bytes = _value_bytes(model.checkpoint, dtype)
    logits = tokens * (find_number(model.config, "vocab_size") or 0) * (value_bytes + 4)
    return _CUBLAS + model.weights * value_bytes + logits


def calibration_device_bytes(source: Checkpoint, seqlen: int, sum_bytes: int, dtype: str) -> int:
    """Return the part of `calibration_bytes` on a GPU, where weights have the dtype of the computation."""
    without_weights = calibration_bytes(source, seqlen, sum_bytes) - WORKER_BASE - 6 * source.weights
    # The backward pass runs in a thread of its own, with its own workspace.
    return 2 * _CUBLAS + without_weights + source.weights * _value_bytes(source, dtype)


def tuning_device_bytes(source: Checkpoint, seqlen: int, dtype: str) -> int:
    """Return the part of `tuning_bytes` on a GPU: two models, the stored parts of one, and one full gradient."""
    largest = max(info.count for info in source.tensors.values())
    return calibration_device_bytes(source, seqlen, source.weights * _value_bytes(source, dtype), dtype) + 8 * largest


def _value_bytes(source: Checkpoint, dtype: str) -> int:
    """Bytes of a weight on a GPU. "auto" stands for the dtype that most bytes of the checkpoint have."""
    if dtype != "auto":
        return 4 if dtype == "float32" else 2
    return max(2, -(-sum(info.nbytes for info in source.tensors.values()) // source.weights)) if source.weights else 2


def tuning_bytes(source: Checkpoint, seqlen: int) -> int:
    """Return the peak memory of a worker that tunes: that of calibration, with a second model instead of Hessians."""
    return calibration_bytes(source, seqlen, 4 * source.weights)

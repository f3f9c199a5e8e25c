"""What work will cost: bytes, bits, peak memory of a worker, seconds of one core."""

import math
from collections import Counter
from collections.abc import Iterable
from functools import singledispatch
from typing import Any

from pipeline.architectures.model_config import find_number
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.models.stored_model import Model
from pipeline.planning.machine_speed import Speed
from pipeline.planning.plan import Plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.matrix import MatrixSettings
from swsc_core.method.codebook_fit import CONJUGATE_STEPS
from swsc_core.method.kmeans import starts_and_refined
from swsc_core.method.pairwise import use_gram
from swsc_core.method.segmentation import GPU_SLAB_WEIGHTS, slab_values
from swsc_core.method.spec import Spec, SwscSpec
from swsc_core.method.svd import is_exact
from swsc_core.method.weighted_kmeans import sample_size
from swsc_core.storage.bits import Geometry

WORKER_BASE = 450 << 20  # bytes of a worker that holds no weights: Python, torch, transformers, Ray
_CUBLAS = 32 << 20  # of torch's memory on a GPU: cuBLAS' workspace of a thread, as pipeline/device.py sets it (:4096:8)
# Float32 copies of a matrix that are alive at the peak of its compression (benchmarks/memory.py, benchmarks/llama7b_shape.py):
_WHOLE, _SEGMENTED = 8, 4  # shared by whole channels, with their Gram matrix; by segments, worked through in slabs
_SLAB_COPIES = 5  # of a slab on a GPU, where it may be the whole matrix
_MOMENTS = 2  # its second moment and the root of that
# What K-Means and SVD take, fitted to runs of benchmarks/llama7b_shape.py and of the demo (docs/experiments.md):
_STARTED, _REFINED = 20, 100  # Lloyd iterations of a start, and of the refinement of one
_STEP_SECONDS = 3e-4  # of an iteration beside the arithmetic; of a seed half of it at least
_NEAREST = 10  # additions of rows in the time of one distance to a mean and its share of the minimum
_SEED = 800  # additions in the time in which one point is looked at for the next seed, all trials together
_KRYLOV = 24  # products of the matrix with `rank` vectors
_DISTANCE = 60  # operations of a GEMM in the time of one distance and its share of the minimum
_CODEBOOK_PASSES = 14  # over the sample of segments: seeding and iterations
_BLOCK_SECONDS = 3e-4  # of the small calls for one block of columns of a slab
_LAPACK = 25  # m·n·min(m, n) operations of an exact SVD
_WEIGHT_SECONDS = 7e-8  # restoring, measuring and packing a weight; RTN, too
_START_SECONDS = 10.0  # until a worker is up


def estimate_cost(plan: Plan, form: str, speed: Speed, workers: int) -> dict[str, Any]:
    """What `swsc plan` prints. Times are those of compression; calibration, curves and tuning come on top."""
    compressed = sum(decision.stored_bytes for decision in plan.compressed)
    count = sum(decision.info.count for decision in plan.compressed)
    return {
        "output_bytes": plan.stored_bytes_as(form),
        "compressed_bits_per_weight": 8 * compressed / count,
        "whole_model_bits_per_weight": 8 * plan.stored_bytes / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
        "worker_peak_bytes": compression_bytes(plan),
        "of_which_on_a_gpu": device_bytes(plan),
        "core_seconds": core_seconds(plan, speed) + _stream_seconds(plan, form, speed),
        "workers": workers,
        "seconds": _wall_seconds(plan, form, speed, workers),
    }


def stage_bytes(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, calibration: CalibrationSettings
) -> dict[str, int]:
    """Peak memory of a worker in each stage of a compression; one that does not fit is to be told of before the first."""
    stages = {"compress": compression_bytes(plan)}
    if settings.needs_hessians:
        sums = hessian_bytes([decision.matrix for decision in plan.compressed])
        at_a_time = min(sums, int(calibration.moment_gib * 2**30))
        stages["calibrate"] = calibration_bytes(source, calibration.calibration_seqlen, at_a_time)
    if settings.epochs:
        stages["tune"] = tuning_bytes(source, calibration.calibration_seqlen)
    return stages


def cached_bytes(plan: Plan, settings: MatrixSettings) -> int:
    """Bytes on disk beside the output: second moments, and the model that is yet to be tuned."""
    moments = hessian_bytes(decision.matrix for decision in plan.compressed) if settings.needs_hessians else 0
    return moments + (plan.stored_bytes_as("swsc") if settings.epochs else 0)


def hessian_bytes(infos: Iterable[MatrixInfo]) -> int:
    """Bytes of the sums of some matrices: a weighted second moment each, and a plain one for every two of the same layer and
    width, in float32. One that is alone, as `down` is, has its own."""
    alike = Counter((layer_of(info.name), info.shape[1]) for info in infos)
    return sum(4 * width**2 * (count + -(-count // 2)) for (_, width), count in alike.items())


def _wall_seconds(plan: Plan, form: str, speed: Speed, workers: int) -> float:
    """Until the last of `workers` is done: the largest layer may be what is waited for."""
    compressing, streaming = core_seconds(plan, speed), _stream_seconds(plan, form, speed)
    share = max((task.nbytes for task in plan.layers), default=0) / max(1, sum(task.nbytes for task in plan.layers))
    return _START_SECONDS + max((compressing + streaming) / workers, compressing * share)


def _stream_seconds(plan: Plan, form: str, speed: Speed) -> float:
    """All is read, and what is written is hashed."""
    read = sum(task.nbytes for task in plan.layers) + sum(task.nbytes for task in plan.copies)
    return max(read, plan.stored_bytes_as(form)) / speed.stream


def compression_bytes(plan: Plan) -> int:
    """Peak memory of a worker that compresses the matrices of `plan`, one at a time."""
    return WORKER_BASE + 4 * max(
        _peak_values(decision.matrix, spec) for decision in plan.compressed for spec in decision.specs
    )


def device_bytes(plan: Plan) -> int:
    """Bytes of a GPU that it takes, if the worker has one."""
    return max(matrix_device_bytes(decision.matrix, spec) for decision in plan.compressed for spec in decision.specs)


def matrix_device_bytes(info: MatrixInfo, spec: Spec) -> int:
    """The same for one matrix. There a slab may be all of it."""
    return _CUBLAS + 4 * (
        _peak_values(info, spec) + (_SLAB_COPIES * min(info.count, GPU_SLAB_WEIGHTS) if spec.cuts_channels else 0)
    )


def _peak_values(info: MatrixInfo, spec: Spec) -> int:
    count, inputs = info.count, info.shape[1]
    moments = _MOMENTS * inputs**2 if spec.needs_hessian else 0
    return (_SEGMENTED if spec.cuts_channels else _WHOLE) * count + moments


def restoring_bytes(model: Model) -> int:
    """Peak memory of a worker that restores the matrices of `model`, one at a time; joined ones are put together and turned round."""
    largest = max(math.prod(entry.shape) for entry in model.entries.values())
    return WORKER_BASE + 4 * _WHOLE * largest + 2 * max(map(model.nbytes, model.pieces), default=0)


def evaluation_bytes(model: Model, dtype: str, tokens: int) -> int:
    """Peak memory of a worker that measures `model` on batches of `tokens` tokens, calculating in `dtype` on a CPU.

    The weights as they are read and as they are calculated with, and the logits of a batch with their float32 copy.
    """
    value_bytes = 2 if dtype in ("float16", "bfloat16") else 4
    logits = tokens * (find_number(model.config, "vocab_size") or 0) * (value_bytes + 4)
    return WORKER_BASE + model.weights * (2 + value_bytes) + logits


def calibration_bytes(source: Checkpoint, seqlen: int, moments: int) -> int:
    """Peak memory of a worker that calibrates on windows of `seqlen` tokens, with `moments` bytes of sums.

    Weights and sums in float32, the activations of one window that the backward pass needs, and five copies of logits.
    """
    keys = ("num_hidden_layers", "hidden_size", "vocab_size")
    layers, width, vocabulary = (find_number(source.config, key) or 0 for key in keys)
    activations = seqlen * layers * 24 * width
    return WORKER_BASE + 6 * source.weights + moments + 4 * (activations + 5 * seqlen * vocabulary)


def evaluation_device_bytes(model: Model, dtype: str, tokens: int) -> int:
    """The part of `evaluation_bytes` that lies on a GPU: weights in the dtype that is calculated in, and logits."""
    value_bytes = _value_bytes(model.checkpoint, dtype)
    logits = tokens * (find_number(model.config, "vocab_size") or 0) * (value_bytes + 4)
    return _CUBLAS + model.weights * value_bytes + logits


def calibration_device_bytes(source: Checkpoint, seqlen: int, moments: int, dtype: str) -> int:
    """The part of `calibration_bytes` that lies on a GPU, where weights have the dtype that is calculated in; the backward
    pass runs in a thread of its own."""
    others = calibration_bytes(source, seqlen, moments) - WORKER_BASE - 6 * source.weights
    return 2 * _CUBLAS + others + source.weights * _value_bytes(source, dtype)


def tuning_device_bytes(source: Checkpoint, seqlen: int, dtype: str) -> int:
    """The part of `tuning_bytes` that lies on a GPU: two models, the stored parts of one of them, and one whole gradient."""
    largest = max(info.count for info in source.tensors.values())
    return calibration_device_bytes(source, seqlen, source.weights * _value_bytes(source, dtype), dtype) + 8 * largest


def _value_bytes(source: Checkpoint, dtype: str) -> int:
    """Bytes of a value on a GPU, where "auto" is the checkpoint's own dtype, by most of its bytes."""
    if dtype != "auto":
        return 4 if dtype == "float32" else 2
    return max(2, -(-sum(info.nbytes for info in source.tensors.values()) // source.weights)) if source.weights else 2


def tuning_bytes(source: Checkpoint, seqlen: int) -> int:
    """Peak memory of a worker that tunes on windows of `seqlen` tokens: as to calibrate, with a second model."""
    return calibration_bytes(source, seqlen, 4 * source.weights)


def core_seconds(plan: Plan, speed: Speed) -> float:
    """Seconds of one core; fitted to one run of 4096×4096 matrices (what that is worth elsewhere: benchmarks/time_estimate.py)."""
    return sum(
        _WEIGHT_SECONDS * decision.matrix.count + _method_seconds(spec, decision.matrix, speed)
        for decision in plan.compressed
        for spec in decision.specs
    )


@singledispatch
def _method_seconds(spec: Spec, matrix: MatrixInfo, speed: Speed) -> float:
    """Seconds beside what every weight takes; a method without an estimate of its own takes none."""
    return 0.0


@_method_seconds.register
def _swsc_seconds(spec: SwscSpec, matrix: MatrixInfo, speed: Speed) -> float:
    m, n = matrix.shape
    svd = _LAPACK * min(m, n) if is_exact(min(m, n), spec.rank) else 2 * _KRYLOV * spec.rank
    sharing = _segment_seconds if spec.cuts_channels else _kmeans_seconds
    return sharing(m, n, spec, speed) + ((1 + spec.rounds) * svd * m * n / speed.gemm if spec.rank else 0)


def _segment_seconds(m: int, n: int, spec: SwscSpec, speed: Speed) -> float:
    """Products with the moment, distances to centroids (bound by memory, not by the GEMM), and small calls per block."""
    layout, k = spec.layout((m, n)), spec.n_clusters
    passes = 1 + spec.rounds
    products = 2 * m * n * n * (passes + CONJUGATE_STEPS * spec.rounds) + n**3 if spec.needs_hessian else 0
    distances = _DISTANCE * k * (layout.count * passes + _CODEBOOK_PASSES * sample_size(k) * spec.codebooks)
    blocks = passes * layout.grid[1] * _BLOCK_SECONDS * -(-m * n // slab_values(m * n))
    return (products + distances) / speed.gemm + blocks


def _kmeans_seconds(m: int, n: int, spec: SwscSpec, speed: Speed) -> float:
    geometry, k = Geometry(m, n, spec.channel_axis), spec.n_clusters
    if k == 0:
        return 0.0
    points, length = geometry.channels, geometry.length
    starts, refined = starts_and_refined(points, k, spec.n_init)
    gram = use_gram(points, length, k, starts)
    once = 2 * points**2 * length / speed.gemm if gram else 0
    step = points**2 / speed.additions if gram else 2 * points * k * length / speed.gemm
    step += _NEAREST * k * points / speed.additions + _STEP_SECONDS
    seed = max(_SEED * points / speed.additions, _STEP_SECONDS / 2)
    return once + (_STARTED * starts + _REFINED * refined) * step + starts * k * seed

"""What work will cost: bytes, bits, peak memory of a worker, seconds of one core."""

import time
from typing import Any

from pipeline.model.artifact import Model
from pipeline.model.plan import Decision, Plan
from swsc_core.bits import Geometry
from swsc_core.spec import Spec, SwscSpec

_WORKER_BASE = 400 << 20  # bytes of a worker that holds no weights: Python, torch, transformers, Ray
_MATRICES = 8  # float32 copies of the largest matrix that are alive at the peak of a compression
# Work of one core in units of a float32 GEMM, fitted to runs of benchmarks/llama7b_shape.py:
_KMEANS_GEMMS = 4  # of all channels with all channels: the Gram matrix, and starts and moves that read it
_SVD_GEMMS = 24  # of the matrix with `rank` vectors
_RTN_OPERATIONS = 100  # a weight


def forecast(plan: Plan, form: str) -> dict[str, Any]:
    """What `swsc plan` prints; the GEMM speed of this machine is measured for a moment."""
    compressed = sum(decision.stored_bytes for decision in plan.compressed)
    count = sum(decision.info.count for decision in plan.compressed)
    operations = sum(_operations(decision, spec) for decision in plan.compressed for spec in decision.specs)
    return {
        "output_bytes": plan.stored_bytes_as(form),
        "compressed_bits_per_weight": 8 * compressed / count,
        "whole_model_bits_per_weight": 8 * plan.stored_bytes / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
        "worker_peak_bytes": compression_bytes(plan.largest_matrix),
        "core_seconds": operations / _gemm_speed(),
    }


def compression_bytes(largest_matrix: int) -> int:
    """Peak memory of a worker that compresses or restores matrices of up to `largest_matrix` weights."""
    return _WORKER_BASE + _MATRICES * 4 * largest_matrix


def evaluation_bytes(model: Model, dtype: str, tokens: int) -> int:
    """Peak memory of a worker that measures `model` on batches of `tokens` tokens, calculating in `dtype` on a CPU.

    The weights as they are read and as they are calculated with, and the logits of a batch with their float32 copy.
    """
    value_bytes = 2 if dtype in ("float16", "bfloat16") else 4
    text = {**model.config, **model.config.get("text_config", {})}
    logits = tokens * text.get("vocab_size", 0) * (value_bytes + 4)
    return _WORKER_BASE + model.weights * (2 + value_bytes) + logits


def _operations(decision: Decision, spec: Spec) -> float:
    m, n = decision.info.shape
    if not isinstance(spec, SwscSpec):
        return float(_RTN_OPERATIONS * m * n)
    channels = Geometry(m, n, spec.channel_axis).channels
    clustering = _KMEANS_GEMMS * channels if spec.n_clusters else 0
    return 2.0 * m * n * (clustering + _SVD_GEMMS * spec.rank)


def _gemm_speed() -> float:
    """Operations a second of a float32 GEMM on one core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square = torch.ones(1024, 1024)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return float(2 * 1024**3 / min(times))

"""Cost model: predicted bytes and bits. `memory.py` predicts the memory of workers, `time_model.py` the time."""

from pipeline.planning.machine_speed import Speed
from pipeline.planning.memory import hessian_bytes, layer_compression_memory
from pipeline.planning.plan import Plan
from pipeline.planning.time_model import core_seconds, stream_seconds, wall_seconds
from pipeline.settings.matrix import MatrixSettings


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
    memory = layer_compression_memory(plan)
    return {
        "output_bytes": plan.stored_bytes_as(form),
        "compressed_bits_per_weight": 8 * compressed / count,
        "whole_model_bits_per_weight": 8 * plan.stored_bytes / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
        "worker_peak_bytes": memory.cpu,
        "of_which_on_a_gpu": memory.device,
        "core_seconds": core_seconds(plan, speed) + stream_seconds(plan, form, speed),
        "workers": workers,
        "seconds": wall_seconds(plan, form, speed, workers),
    }


def cached_bytes(plan: Plan, settings: MatrixSettings) -> int:
    """Return the bytes of cached files next to the output: Hessians, and the compressed model before tuning."""
    hessians = hessian_bytes(decision.matrix for decision in plan.compressed) if settings.needs_hessians else 0
    return hessians + (plan.stored_bytes_as("swsc") if settings.epochs else 0)

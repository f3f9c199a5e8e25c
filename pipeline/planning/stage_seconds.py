"""Predicted seconds of one core for the stages of a compression that need a text: calibration, curves, tuning."""

from dataclasses import replace

from pipeline.architectures.tensor_names import tensor_kind
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.planning.machine_speed import Speed
from pipeline.planning.plan import Plan
from pipeline.planning.spec_resolution import value_bits
from pipeline.planning.time_model import forward_seconds, matrix_seconds
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.matrix import MatrixSettings
from swsc_core.allocation.candidate_specs import candidates
from swsc_core.allocation.sensitivity import sampled_rows

# Forward passes that take as long as the backward pass through the activations.
_BACKWARD = 1
# Forward passes per token of tuning: the original model, and the compressed one with gradients of its weights, which
# are restored before and updated after.
_TUNING = 5
# Forward passes that take as long as writing a token, for which all weights are read for a few windows only.
_WRITING = 4
# Operations per token and squared width of a matrix: a weighted Hessian, and half of an unweighted one.
_HESSIAN = 3


def stage_seconds(
    source: Checkpoint, plan: Plan, settings: MatrixSettings, calibration: CalibrationSettings, speed: Speed
) -> dict[str, float]:
    """Return the core seconds of the stages besides the compression, by their names; empty without a text."""
    tokens = calibration.calibration_windows * calibration.calibration_seqlen
    forward = forward_seconds(source.weights, tokens, speed)
    stages = {}
    if settings.preset_definition.generates_text:
        stages["write_text"] = _WRITING * forward
    if settings.needs_hessians:
        hessians = _HESSIAN * tokens * sum(decision.matrix.shape[1] ** 2 for decision in plan.compressed)
        stages["calibrate"] = (1 + _BACKWARD) * forward + hessians / speed.gemm
    if settings.preset_definition.allocates:
        stages["curves"] = _curve_seconds(plan, settings, speed)
    if settings.epochs:
        stages["tune"] = settings.epochs * _TUNING * forward
    return stages


def _curve_seconds(plan: Plan, settings: MatrixSettings, speed: Speed) -> float:
    """Seconds to measure all candidate specs on some rows of one matrix of each kind and shape."""
    kinds = {(tensor_kind(decision.info.name), decision.matrix.shape): decision.matrix for decision in plan.compressed}
    return sum(
        matrix_seconds(replace(matrix, shape=(sampled_rows(matrix.shape, spec), matrix.shape[1])), [spec], speed)
        for matrix in kinds.values()
        for spec in candidates(matrix.shape, value_bits(matrix.dtype, settings))
    )

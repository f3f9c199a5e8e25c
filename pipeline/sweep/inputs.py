"""The inputs of a sweep: its settings, the models, and the windows of each evaluation text for each model."""

from dataclasses import dataclass

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.evaluation.flow import require_measurable
from pipeline.models.causality import require_causal
from pipeline.models.stored_model import Model
from pipeline.outputs.preflight import examine
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.sweep import SweepSettings
from pipeline.sweep.runs import Run
from pipeline.texts.windows import Windows, make_windows


@dataclass(frozen=True)
class SweepInputs:
    """What a sweep reads.

    Attributes:
        checkpoints: the models, in the order of the settings.
        windows: for each model, the windows of each evaluation.
    """

    settings: SweepSettings
    checkpoints: list[Checkpoint]
    windows: list[list[Windows]]

    def location_of(self, run: Run) -> str:
        """Location of the run's model, as the settings have it."""
        return self.settings.models[run.model]

    def checkpoint_of(self, run: Run) -> Checkpoint:
        """The run's model before its compression."""
        return self.checkpoints[run.model]

    def evaluations_of(self, run: Run) -> list[tuple[Windows, EvaluateSettings]]:
        """Windows and settings of each evaluation of a run."""
        return list(zip(self.windows[run.model], self.settings.evaluations, strict=True))


def open_inputs(settings: SweepSettings) -> SweepInputs:
    """Open models and texts.

    Raises:
        CheckpointError: a model that cannot be compressed or evaluated.
        TextError: a text that cannot be cut into windows, or that a model was calibrated on.
    """
    checkpoints = [open_checkpoint(location) for location in settings.models]
    for checkpoint in checkpoints:
        examine(Model(checkpoint, {}), settings.trust_remote_code, measured=True)
        if settings.evaluations:
            require_causal(Model(checkpoint, {}), settings.trust_remote_code)
    windows = [[make_windows(model, evaluation) for evaluation in settings.evaluations] for model in settings.models]
    for checkpoint, windows_of_model in zip(checkpoints, windows, strict=True):
        for cut, evaluation in zip(windows_of_model, settings.evaluations, strict=True):
            require_measurable(Model(checkpoint, {}), cut, evaluation)
    return SweepInputs(settings, checkpoints, windows)

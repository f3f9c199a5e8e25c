"""Calibration tokens for all tools: the windows that `swsc compress` calibrates on."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.validation import validated
from pipeline.texts.contamination import require_uncontaminated
from pipeline.texts.texts import read_text
from pipeline.texts.windows import calibration_windows


def calibration_tokens(
    model: str, calibration: str, windows: int, seqlen: int, measured_on: str, folder: Path
) -> tuple[Path, str]:
    """Write the windows of `calibration`, int64 [windows, seqlen], to a file; returns it and the sha256 of the tokens.

    Raises:
        ConfigError: a setting is out of range.
        TextError: the text is too short, or shares passages with the text `measured_on`.
    """
    given = {"calibration": calibration, "calibration_windows": windows, "calibration_seqlen": seqlen}
    text = calibration_windows(model, validated(CalibrationSettings, given))
    require_uncontaminated(text.hashes, read_text(measured_on), measured_on)
    digest = hashlib.sha256(text.ids.tobytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"calibration-{windows}x{seqlen}-{digest[:8]}.npy"
    np.save(file, text.ids)
    return file, digest

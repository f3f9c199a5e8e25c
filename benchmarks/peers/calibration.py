"""Calibration tokens, made once so that every tool sees the same: windows at even distances over a text, no overlap."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline.errors import TextError
from pipeline.measure.windows import read_text


def cut(ids: np.ndarray, windows: int, seqlen: int, text: str) -> np.ndarray:
    """int64 [windows, seqlen]; window i begins at token i · floor(len / windows).

    Raises:
        TextError: the text is too short for windows that do not overlap.
    """
    stride = len(ids) // windows
    if stride < seqlen:
        raise TextError(
            f"text {text}: {len(ids)} tokens are too few for {windows} windows of {seqlen}; give a longer one"
        )
    return np.stack([ids[start : start + seqlen] for start in range(0, windows * stride, stride)])


def calibration_tokens(model: str, text: str, windows: int, seqlen: int, folder: Path) -> tuple[Path, str]:
    """The file that holds the windows of `text`, tokenised as `model` does it, and the sha256 of their tokens."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # "sequence longer than the model's maximum": it is cut below
    ids = np.asarray(AutoTokenizer.from_pretrained(model)(read_text(text))["input_ids"], dtype=np.int64)
    tokens = cut(ids, windows, seqlen, text)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    file = folder / f"calibration-{windows}x{seqlen}-{digest[:8]}.npy"
    np.save(file, tokens)
    return file, digest

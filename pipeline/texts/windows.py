"""Text to windows: the standard protocol of perplexity, as GPTQ's published code has it.

The whole text is tokenised once, by the tokenizer's own rules (a BOS that it adds stands once, at the very start), and
cut into floor(n / L) windows of L tokens without overlap; the tail is dropped.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.architectures.families import has_position_table
from pipeline.architectures.model_config import find_number, max_positions
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.sources.small_files import require_no_custom_code, small_files
from pipeline.errors import SwscError, TextError, first_line
from pipeline.redaction import redacted
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.texts.contamination import traces
from pipeline.texts.texts import open_text


@dataclass(frozen=True)
class Windows:
    """Token ids int64 [windows, seqlen] of a text, and what must be said beside a perplexity measured on them.

    Attributes:
        documents, column: of the table that the text was made of; None for a plain file.
    """

    ids: np.ndarray
    text: str
    text_sha256: str
    text_tokens: int
    bos: str
    documents: int | None = None
    column: str | None = None


def make_windows(model: str, settings: EvaluateSettings) -> Windows:
    """Tokenise the text by the tokenizer of `model` and cut it.

    Raises:
        TextError: no such text, one shorter than a window, or fewer windows than asked for.
    """
    text = open_text(settings.text, settings.text_column)
    if settings.text_column and text.documents is None:
        raise TextError(f"text {settings.text}: a plain file has no columns; drop --text-column")
    tokenizer = load_tokenizer(model, settings.trust_remote_code)
    ids, bos_token = _ids(tokenizer, text.content), tokenizer.bos_token_id
    length, wanted = settings.seqlen, settings.windows
    available = len(ids) // length
    if available < (wanted or 1):
        raise TextError(
            f"text {settings.text}: {len(ids)} tokens make {available} windows of {length}, wanted {wanted or 1};"
            " give a longer text, or lower --seqlen or --windows"
        )
    count = wanted or available
    starts_with_bos = bos_token is not None and len(ids) and ids[0] == bos_token
    return Windows(
        ids=ids[: count * length].reshape(count, length),
        text=redacted(settings.text),
        text_sha256=hashlib.sha256(text.content.encode()).hexdigest(),
        text_tokens=len(ids),
        bos="once, at the start of the text" if starts_with_bos else "none",
        documents=text.documents,
        column=text.column,
    )


def require_within(ids: np.ndarray, source: Checkpoint) -> None:
    """Raise TextError for windows, int64 [windows, length], of tokens or positions that `source` has no row for.

    On a CPU a table of embeddings would say so, on a GPU it would take the worker with it.
    """
    known, table = find_number(source.config, "vocab_size"), has_position_table(source.config, source.tensors)
    positions = max_positions(source.config) if table else None
    most, length = int(ids.max(initial=0)), ids.shape[1]
    if (known and most >= known) or (positions and length > positions):
        raise TextError(
            f"the model was made for {max_positions(source.config)} positions and {known} tokens, its input has others ({length}"
            f" positions, token {most}): make windows shorter, or give the model its own tokenizer"
        )


@dataclass(frozen=True)
class CalibrationText:
    """Token ids int64 [windows, seqlen], spread evenly over a text, and the text's traces (overlap.py).

    Attributes:
        origin: how the text was made of a table, in words; "" for a plain file.
    """

    ids: np.ndarray
    traces: frozenset[str]
    origin: str = ""


def calibration_windows(model: str, settings: CalibrationSettings) -> CalibrationText:
    """Cut windows out of the calibration text, as far apart from each other as it allows, each opened as a text is.

    A model that was made to see a BOS first is lost for a while without one, and its gradients there are those of no text
    that it will ever be given (docs/method.md, section 2).

    Raises:
        TextError: no text given, no such text, or one shorter than all windows together.
    """
    if settings.calibration is None:
        raise TextError("calibration: no text given; name one by --calibration, or choose preset paper")
    text = open_text(settings.calibration, settings.text_column, split="train")
    tokenizer = load_tokenizer(model, settings.trust_remote_code)
    ids, opening = _ids(tokenizer, text.content, add_special_tokens=False), opening_of(tokenizer)
    length, count = settings.calibration_seqlen, settings.calibration_windows
    if len(ids) < length * count:
        raise TextError(
            f"calibration text {settings.calibration}: {len(ids)} tokens, wanted {count} windows of {length}; give a longer"
            " text, or lower --calibration-windows or --calibration-seqlen"
        )
    starts = [index * (len(ids) // count) for index in range(count)]
    windows = [np.concatenate([opening, ids[start : start + length - len(opening)]]) for start in starts]
    return CalibrationText(np.stack(windows), traces(text.content), text.origin)


def opening_of(tokenizer: Any) -> np.ndarray:
    """Token ids, int64, that the tokenizer puts before every text: its BOS, as a rule, or nothing."""
    whole, bare = _ids(tokenizer, "a").tolist(), _ids(tokenizer, "a", add_special_tokens=False).tolist()
    before = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
    return np.asarray(whole[:before], dtype=np.int64)


def _ids(tokenizer: Any, text: str, **how: Any) -> np.ndarray:
    """Token ids of the whole text, int64; TextError if the tokenizer cannot cut it."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # "sequence longer than the model's maximum": it is cut into windows
    try:
        ids = np.asarray(tokenizer(text, **how)["input_ids"], dtype=np.int64)
        if ids.ndim != 1 or (ids.size and ids.min() < 0):
            raise ValueError(f"token ids of shape {list(ids.shape)}, or below 0")
    except BaseException as error:  # what a model's own files bring about, a panic of the Rust library among it
        if not _is_of_a_tokenizer(error):
            raise
        reason = first_line(error)
        raise TextError(
            f"{getattr(tokenizer, 'name_or_path', 'model')}: its tokenizer cannot cut a text ({type(error).__name__}: {reason});"
            " repair tokenizer.json and tokenizer_config.json"
        ) from None
    return ids


def _is_of_a_tokenizer(error: BaseException) -> bool:
    """Whether an error is one that a damaged or hostile tokenizer brings about; no interruption, no lack of memory."""
    panic = type(error).__name__ == "PanicException"  # of the Rust library, which is no Exception
    return panic or (isinstance(error, Exception) and not isinstance(error, MemoryError | SwscError))


def load_tokenizer(model: str, trusted: bool) -> Any:
    """The tokenizer of `model`; TextError if it has none that can be loaded, `trusted`: its own code may be run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(small_files(model), trust_remote_code=trusted)
    except BaseException as error:  # a damaged file makes the library raise whatever its parser meets
        if not _is_of_a_tokenizer(error):
            raise
        require_no_custom_code(model, error)
        reason = first_line(error)
        raise TextError(f"{model}: no tokenizer to cut the text with ({type(error).__name__}: {reason})") from None

"""Windows of tokens of a text, by the standard protocol of perplexity (as in the published code of GPTQ).

The whole text is tokenized once, with the special tokens of the tokenizer: a BOS occurs once, at the very start. The
tokens are cut into floor(n / L) windows of L tokens without overlap, and the tail is dropped.
"""

import hashlib
from dataclasses import dataclass
from logging import ERROR
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
from pipeline.texts.contamination import passage_hashes
from pipeline.texts.texts import open_text


@dataclass(frozen=True)
class Windows:
    """Windows of an evaluation text, and the facts about it that a perplexity is reported with.

    Attributes:
        ids: token ids, int64 [windows, seqlen].
        text: name of the text, without secrets.
        text_sha256: sha256 of the text.
        text_tokens: tokens of the whole text.
        bos: where BOS tokens occur, in words.
        documents: number of documents of a table that the text consists of; None for a plain file.
        column: the column of the table; None for a plain file.
    """

    ids: np.ndarray
    text: str
    text_sha256: str
    text_tokens: int
    bos: str
    documents: int | None = None
    column: str | None = None


def make_windows(model: str, settings: EvaluateSettings) -> Windows:
    """Tokenize the text with the tokenizer of `model` and cut it into windows.

    Raises:
        TextError: the text does not exist, or has fewer windows than requested, or none.
    """
    text = open_text(settings.text, settings.text_column)
    if settings.text_column and text.documents is None:
        raise TextError(f"text {settings.text}: a plain file has no columns; omit --text-column")
    tokenizer = load_tokenizer(model, settings.trust_remote_code)
    ids, length = _tokenize(tokenizer, text.content), settings.seqlen
    available = len(ids) // length
    count = settings.windows or available
    if available < max(count, 1):
        raise TextError(
            f"text {settings.text}: {len(ids)} tokens make {available} windows of {length}, expected"
            f" {max(count, 1)}; give a longer text, or lower --seqlen or --windows"
        )
    bos_token = tokenizer.bos_token_id
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
    """Check that the model has embeddings for all tokens and positions of the windows.

    Args:
        ids: token ids, int64 [windows, length].

    Raises:
        TextError: a token or a position has no embedding. On a CPU the lookup would fail with an error; on a GPU it
            would terminate the worker.
    """
    vocabulary = find_number(source.config, "vocab_size")
    has_table = has_position_table(source.config, source.tensors)
    positions = max_positions(source.config) if has_table else None
    largest, length = int(ids.max(initial=0)), ids.shape[1]
    if vocabulary and largest >= vocabulary:
        raise TextError(
            f"token {largest} is beyond the model's vocabulary of {vocabulary} tokens; give the model its own tokenizer"
        )
    if positions and length > positions:
        raise TextError(
            f"windows of {length} tokens are longer than the model's table of {positions} positions; make them shorter"
        )


@dataclass(frozen=True)
class CalibrationText:
    """Windows of a calibration text.

    Attributes:
        ids: token ids, int64 [windows, seqlen], of windows spread evenly over the text.
        hashes: `passage_hashes` of the text.
        origin: how the text was assembled from a table, in words; "" for a plain file.
    """

    ids: np.ndarray
    hashes: frozenset[str]
    origin: str = ""


def calibration_windows(model: str, settings: CalibrationSettings) -> CalibrationText:
    """Cut evenly spaced windows out of the calibration text, and put the tokenizer's prefix before each.

    A model that was trained with a BOS computes unusual activations and gradients for the first tokens without one
    (docs/method.md, section 2).

    Raises:
        TextError: no text is given, it does not exist, or it is shorter than all windows together.
    """
    if settings.calibration is None:
        raise TextError("calibration: no text given; name one with --calibration, or choose preset paper")
    text = open_text(settings.calibration, settings.text_column, split="train")
    tokenizer = load_tokenizer(model, settings.trust_remote_code)
    ids, prefix = _tokenize(tokenizer, text.content, special_tokens=False), prefix_tokens(tokenizer)
    length, count = settings.calibration_seqlen, settings.calibration_windows
    if len(ids) < length * count:
        raise TextError(
            f"calibration text {settings.calibration}: {len(ids)} tokens, but {count} windows of {length} are"
            " needed; give a longer text, or lower --calibration-windows or --calibration-seqlen"
        )
    starts = [index * (len(ids) // count) for index in range(count)]
    windows = [np.concatenate([prefix, ids[start : start + length - len(prefix)]]) for start in starts]
    return CalibrationText(np.stack(windows), passage_hashes(text.content), text.origin)


def prefix_tokens(tokenizer: Any) -> np.ndarray:
    """Token ids, int64, that the tokenizer puts before every text: usually BOS, or none."""
    complete = _tokenize(tokenizer, "a").tolist()
    bare = _tokenize(tokenizer, "a", special_tokens=False).tolist()
    length = next((index for index in range(len(complete)) if complete[index : index + len(bare)] == bare), 0)
    return np.asarray(complete[:length], dtype=np.int64)


def _tokenize(tokenizer: Any, text: str, special_tokens: bool = True) -> np.ndarray:
    """Token ids of the whole text, int64 [tokens]; raise TextError if the tokenizer fails."""
    from transformers.utils import logging

    # Silences "sequence longer than the model's maximum": the tokens are cut into windows.
    logging.set_verbosity(ERROR)
    options = {} if special_tokens else {"add_special_tokens": False}
    try:
        ids = np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int64)
        if ids.ndim != 1 or (ids.size and ids.min() < 0):
            raise ValueError(f"token ids of shape {list(ids.shape)}, or below 0")
    except BaseException as error:  # also a panic of the Rust library, which is not an Exception
        if not _is_tokenizer_error(error):
            raise
        raise TextError(
            f"{getattr(tokenizer, 'name_or_path', 'model')}: its tokenizer cannot tokenize the text"
            f" ({type(error).__name__}: {first_line(error)}); repair tokenizer.json and tokenizer_config.json"
        ) from None
    return ids


def _is_tokenizer_error(error: BaseException) -> bool:
    """Whether a damaged or malicious tokenizer caused the error, in contrast to an interruption or a lack of memory."""
    is_rust_panic = type(error).__name__ == "PanicException"
    return is_rust_panic or (isinstance(error, Exception) and not isinstance(error, MemoryError | SwscError))


def load_tokenizer(model: str, trusted: bool) -> Any:
    """Load the tokenizer of `model`.

    Args:
        trusted: code that the model contains may be run.

    Raises:
        TextError: the model has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(small_files(model), trust_remote_code=trusted)
    except BaseException as error:  # the library raises whatever its parsers raise for a damaged file
        if not _is_tokenizer_error(error):
            raise
        require_no_custom_code(model, error)
        raise TextError(
            f"{model}: no tokenizer that can be loaded ({type(error).__name__}: {first_line(error)}); add its tokenizer"
            " files"
        ) from None

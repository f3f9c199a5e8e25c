"""Text to windows: the standard protocol of perplexity, as GPTQ's published code has it.

The whole text is tokenised once, by the tokenizer's own rules (a BOS that it adds stands once, at the very start), and
cut into floor(n / L) windows of L tokens without overlap; the tail is dropped.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import EvaluateSettings
from pipeline.errors import TextError

WIKITEXT2 = "wikitext2"


@dataclass(frozen=True)
class Windows:
    """Token ids int64 [windows, seqlen] of a text, and what must be said beside a perplexity measured on them."""

    ids: np.ndarray
    text: str
    text_sha256: str
    text_tokens: int
    bos: str


def make_windows(model: str, settings: EvaluateSettings) -> Windows:
    """Tokenise the text by the tokenizer of `model` and cut it.

    Raises:
        TextError: no such text, one shorter than a window, or fewer windows than asked for.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    text = read_text(settings.text)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a damaged file makes the library raise whatever its parser meets
        reason = (str(error).splitlines() or [""])[0]
        raise TextError(f"{model}: no tokenizer to cut the text with ({type(error).__name__}: {reason})") from None
    logging.set_verbosity_error()  # "sequence longer than the model's maximum": it is cut below
    ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)
    length, wanted = settings.seqlen, settings.windows
    available = len(ids) // length
    if available < (wanted or 1):
        raise TextError(
            f"text {settings.text}: {len(ids)} tokens make {available} windows of {length}, wanted {wanted or 1};"
            " give a longer text, or lower --seqlen or --windows"
        )
    count = wanted or available
    starts_with_bos = tokenizer.bos_token_id is not None and len(ids) and ids[0] == tokenizer.bos_token_id
    return Windows(
        ids=ids[: count * length].reshape(count, length),
        text=settings.text,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        text_tokens=len(ids),
        bos="once, at the start of the text" if starts_with_bos else "none",
    )


def read_text(name: str) -> str:
    """The text of a file, byte for byte, or WikiText-2's test rows from the Hub joined by blank lines."""
    if name == WIKITEXT2:
        return _wikitext2()
    try:
        return Path(name).read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"text {name}: {error.strerror}; give a text file, or {WIKITEXT2}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"text {name}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _wikitext2() -> str:
    from datasets import load_dataset

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except Exception as error:  # the library has no common root for "offline", "not found" and "refused"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TextError(f"text {WIKITEXT2}: the Hub did not give it ({reason}); name a text file instead") from None
    return "\n\n".join(rows["text"])

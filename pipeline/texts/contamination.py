"""Whether two texts share passages: a model must not be calibrated on what it is measured on.

A passage of 16 words is hashed, and one hash in sixteen is kept: a copied paragraph of some hundred words then leaves a
trace with near certainty, and the traces of a text of a million words are small enough to travel with a model. Letters and digits
alone count: WikiText sets blanks around punctuation, and other copies of the same articles do not. In scripts that set no space
between words each character counts as one.
"""

import hashlib
import re
import unicodedata

from pipeline.errors import TextError

_WORDS = 16
_KEPT = 16  # one hash in so many
_LONGEST = 24  # characters of a word; what is longer has no spaces where words end
_WORD = re.compile(r"[^\W_]+")


def traces(text: str) -> frozenset[str]:
    """Hashes (16 hexadecimal digits) of passages of the text; white space, punctuation and letter case are passed over."""
    runs = unicodedata.normalize("NFKC", text).lower().split()
    words = [word for run in runs for word in _WORD.findall(run) for word in (word if len(run) > _LONGEST else [word])]
    passages = (" ".join(words[start : start + _WORDS]) for start in range(max(0, len(words) - _WORDS + 1)))
    hashes = (hashlib.blake2b(passage.encode(), digest_size=8).digest() for passage in passages)
    return frozenset(digest.hex() for digest in hashes if digest[0] % _KEPT == 0)


def require_apart(calibration: frozenset[str], evaluation_text: str, name: str) -> None:
    """Raise TextError if the text to be measured on shares passages with the traces of the calibration text."""
    shared = calibration & traces(evaluation_text)
    if shared:
        raise TextError(
            f"text {name}: shares passages with the calibration text ({len(shared)} found in a sample of one in {_KEPT});"
            " a figure measured on it would flatter: give another text, or calibrate on another one"
        )

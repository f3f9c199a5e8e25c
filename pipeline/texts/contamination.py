"""Contamination: whether an evaluation text shares passages with the calibration text.

Each passage of 16 words is hashed, and one hash in 16 is kept. A copied paragraph of some hundred words almost
certainly leaves a common hash, and the hashes of a text of a million words are small enough to be stored with a
model. Only letters and digits count, because copies of one text differ in spaces around punctuation. In scripts that
put no space between words, each character counts as one word.
"""

import hashlib
import re
import unicodedata

from pipeline.errors import TextError

# Words of a passage.
_PASSAGE_WORDS = 16
# One hash in so many is kept.
_SAMPLING = 16
# Longest word in characters. A longer run is split into its characters: its script puts no spaces between words.
_MAX_WORD_CHARACTERS = 24
_WORD = re.compile(r"[^\W_]+")


def passage_hashes(text: str) -> frozenset[str]:
    """Sampled hashes of the text's passages, 16 hexadecimal digits each; spaces, punctuation and case do not count."""
    words = _words(text)
    count = max(0, len(words) - _PASSAGE_WORDS + 1)
    passages = (" ".join(words[start : start + _PASSAGE_WORDS]) for start in range(count))
    digests = (hashlib.blake2b(passage.encode(), digest_size=8).digest() for passage in passages)
    return frozenset(digest.hex() for digest in digests if digest[0] % _SAMPLING == 0)


def _words(text: str) -> list[str]:
    runs = unicodedata.normalize("NFKC", text).lower().split()
    return [
        word
        for run in runs
        for match in _WORD.findall(run)
        for word in (match if len(run) > _MAX_WORD_CHARACTERS else [match])
    ]


def require_uncontaminated(calibration: frozenset[str], evaluation_text: str, name: str) -> None:
    """Raise TextError if the evaluation text shares passages with the calibration text.

    Args:
        calibration: `passage_hashes` of the calibration text.
        name: of the evaluation text.
    """
    shared = calibration & passage_hashes(evaluation_text)
    if shared:
        raise TextError(
            f"text {name}: shares passages with the calibration text ({len(shared)} in a sample of one in {_SAMPLING}),"
            " so its perplexity would be too low; give another text, or calibrate on another one"
        )

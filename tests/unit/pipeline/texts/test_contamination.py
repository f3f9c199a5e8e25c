"""Claims about passages that two texts share."""

import random

import pytest

from pipeline.errors import TextError
from pipeline.texts.contamination import passage_hashes, require_uncontaminated


def words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"word{draw.randrange(5000)}" for _ in range(count)]


def test_a_copied_passage_is_found_whatever_its_case_and_white_space() -> None:
    passage = words(0, 200)
    calibration = " ".join(words(1, 500) + passage + words(2, 500))
    measured = "\n".join(words(3, 300)) + "\n" + "  ".join(passage).upper() + " " + " ".join(words(4, 300))
    with pytest.raises(TextError, match=r"text t\.txt: shares passages with the calibration text .*give another text"):
        require_uncontaminated(passage_hashes(calibration), measured, "t.txt")


def test_a_copied_passage_is_found_in_a_script_without_spaces() -> None:
    def sentences(seed: int) -> str:
        draw = random.Random(seed)
        return "".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(400))

    require_uncontaminated(passage_hashes(sentences(0)), sentences(1), "t.txt")
    with pytest.raises(TextError, match="shares passages"):
        require_uncontaminated(passage_hashes(sentences(0) + sentences(2)), sentences(1) + "\n" + sentences(2), "t.txt")


def test_a_copied_passage_is_found_whatever_is_set_between_its_words() -> None:
    """WikiText's spelling, typographic quotes, a dash, full-width letters, an accent as a separate character."""
    plain = [f"the {word}-old {word}, “{word}” (a café)." for word in words(7, 60)]
    wikitext = [f'the {word} @-@ old {word} , " {word} " ( a cafe\u0301 ) .' for word in words(7, 60)]
    assert passage_hashes(" ".join(plain)) == passage_hashes(" ".join(wikitext).replace("old", "ｏｌｄ")) != frozenset()


def test_texts_of_the_same_words_in_another_order_are_distinct() -> None:
    require_uncontaminated(passage_hashes(" ".join(words(5, 4000))), " ".join(words(6, 4000)), "t.txt")


def test_a_text_shorter_than_a_passage_leaves_no_trace() -> None:
    assert passage_hashes("a few words only") == frozenset()

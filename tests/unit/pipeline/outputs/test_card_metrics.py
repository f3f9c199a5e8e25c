"""Perplexities in the front matter of a card: one row per protocol."""

from dataclasses import replace
from typing import Any

from huggingface_hub import ModelCard

from pipeline.outputs.card_metrics import Perplexity, with_evaluation

CARD = "---\ntags:\n- swsc\n---\n\n# tiny, compressed by SWSC\n"
RESULT = Perplexity(12.34567, "/data/wiki.txt", "a" * 64, 32, 2, "none", "float32", uncompressed=10.0)


def rows(card: str) -> list[tuple[float, float | None]]:
    """Perplexity and uncompressed perplexity of each row."""
    data: Any = ModelCard(card).data
    return [(row.metric_value, (row.metric_args or {}).get("uncompressed")) for row in data.eval_results]


def test_a_result_of_the_same_protocol_replaces_the_former_and_inherits_its_uncompressed_perplexity() -> None:
    card = with_evaluation(with_evaluation(CARD, RESULT), replace(RESULT, value=11.0, uncompressed=None))
    assert rows(card) == [(11.0, 10.0)]


def test_another_protocol_gets_a_row_of_its_own() -> None:
    card = with_evaluation(with_evaluation(CARD, RESULT), replace(RESULT, windows=3, uncompressed=None))
    assert rows(card) == [(12.3457, 10.0), (12.3457, None)]


def test_the_table_names_the_text_without_its_directory() -> None:
    card = with_evaluation(CARD, RESULT)
    assert "wiki.txt" in card
    assert "/data" not in card

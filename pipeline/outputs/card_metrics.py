"""Perplexities in a model card: in its front matter, for the Hub and this module, and in a table, for readers.

Perplexities are comparable only within one protocol: text (by hash), windows, BOS and data type. A card has one row per
protocol.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.outputs.model_card import front_matter_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# Keys of a result that two perplexities must share to be comparable.
PROTOCOL = ("text_sha256", "seqlen", "windows", "bos", "dtype")
# Heading of the last section of a card.
_HEADING = "## Evaluation\n\n"
# Digits of a perplexity in the front matter.
_DIGITS = 4


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its protocol.

    Attributes:
        uncompressed: perplexity of the uncompressed model by the same protocol; None keeps the one that the card has.
    """

    value: float
    text: str
    text_sha256: str
    seqlen: int
    windows: int
    bos: str
    dtype: str
    uncompressed: float | None = None

    def to_row(self) -> "EvalResult":
        """The row of the front matter."""
        from huggingface_hub import EvalResult

        name = os.path.basename(self.text)
        return EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_revision=self.text_sha256,
            metric_type="perplexity",
            metric_value=round(self.value, _DIGITS),
            metric_args={
                **{key: getattr(self, key) for key in PROTOCOL if key != "text_sha256"},
                "overlap": 0,
                **({} if self.uncompressed is None else {"uncompressed": round(self.uncompressed, _DIGITS)}),
            },
        )


def with_evaluation(card: str, perplexity: Perplexity) -> str:
    """Return `card` with the perplexity in its front matter and table, where it replaces one of the same protocol.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the card was not written by this module.
    """
    from huggingface_hub import ModelCard

    front_matter_of(card)  # checks the size, which the library does not
    model_card = ModelCard(card)
    data: Any = model_card.data
    data.eval_results = _with_row(list(data.eval_results or []), perplexity.to_row())
    data.model_name = data.model_name or f"{model_card.text.strip()[2:].partition(',')[0]}-swsc"
    body = model_card.text.partition(_HEADING)[0].rstrip("\n")
    model_card.text = f"{body}\n\n{_HEADING}{_table(data.eval_results)}\n"
    return str(model_card)


def _with_row(rows: "list[EvalResult]", row: "EvalResult") -> "list[EvalResult]":
    """The rows with `row`, which replaces the one of the same protocol and inherits its uncompressed perplexity."""
    index = next((index for index, old in enumerate(rows) if _protocol_of(old) == _protocol_of(row)), len(rows))
    replaced = rows[index : index + 1]
    if replaced and _uncompressed_of(row) is None and (value := _uncompressed_of(replaced[0])) is not None:
        row.metric_args = {**(row.metric_args or {}), "uncompressed": value}
    return [*rows[:index], row, *rows[index + 1 :]]


def _protocol_of(row: Any) -> tuple[str, dict[str, object]]:
    return row.dataset_revision, {key: value for key, value in row.metric_args.items() if key != "uncompressed"}


def _uncompressed_of(row: Any) -> float | None:
    value: float | None = row.metric_args.get("uncompressed")
    return value


def _table(rows: list[Any]) -> str:
    lines = ["| text | protocol | perplexity | uncompressed |", "|---|---|---|---|"]
    for row in rows:
        args, uncompressed = row.metric_args, _uncompressed_of(row)
        text = " ".join(row.dataset_name.split()).replace("|", r"\|")
        protocol = (
            f"{args['windows']} windows of {args['seqlen']} tokens, no overlap, BOS {args['bos']}, {args['dtype']}"
        )
        lines.append(
            f"| {text} (sha256 `{row.dataset_revision[:16]}…`) | {protocol} | {row.metric_value:.3f} |"
            f" {'' if uncompressed is None else f'{uncompressed:.3f}'} |"
        )
    return "\n".join([*lines, "", "Measured by `swsc evaluate`; the front matter has the full hashes."])

"""Perplexities in a model card: in its front matter, where the Hub and this module find them again, and as a table for people.

A perplexity means nothing without its protocol, so rows are told apart by it: text (by hash), windows, BOS and arithmetic.
"""

import os
from collections.abc import Mapping
from typing import Any

from pipeline.outputs.model_card import front_matter_of

PROTOCOL = ("text_sha256", "seqlen", "windows", "bos", "dtype")  # what two perplexities must share to be compared
_HEADING = "## Evaluation\n\n"  # the last of a card
_DIGITS = 4  # of a perplexity


def with_evaluation(card: str, result: Mapping[str, Any], uncompressed: float | None) -> str:
    """`card` with one more perplexity in its front matter and its table; one of the same protocol gives way to it.

    Args:
        result: as `evaluate_model` returns it.
        uncompressed: perplexity of the model before, by the same protocol; None: what the card says of it stays.
    """
    from huggingface_hub import EvalResult, ModelCard

    front_matter_of(card)  # within bounds: the library has none
    read = ModelCard(card)
    data: Any = read.data
    rows = list(data.eval_results or [])
    protocol = {key: result[key] for key in PROTOCOL if key != "text_sha256"} | {"overlap": 0}
    text = os.path.basename(result["text"])
    row = EvalResult(
        task_type="text-generation",
        dataset_type=text,
        dataset_name=text,
        dataset_revision=result["text_sha256"],
        metric_type="perplexity",
        metric_value=round(result["perplexity"], _DIGITS),
        metric_args=protocol,
    )
    place = next((at for at, old in enumerate(rows) if _protocol_of(old) == _protocol_of(row)), len(rows))
    known = uncompressed if uncompressed is not None else _uncompressed(rows[place]) if place < len(rows) else None
    if known is not None:
        protocol["uncompressed"] = round(known, _DIGITS)
    rows[place : place + 1] = [row]
    data.eval_results = rows
    data.model_name = data.model_name or f"{read.text.strip()[2:].partition(',')[0]}-swsc"
    read.text = read.text.partition(_HEADING)[0].rstrip("\n") + f"\n\n{_HEADING}{_evaluations(rows)}\n"
    return str(read)


def _protocol_of(row: Any) -> tuple[str, dict[str, Any]]:
    return row.dataset_revision, {key: value for key, value in row.metric_args.items() if key != "uncompressed"}


def _uncompressed(row: Any) -> float | None:
    value: float | None = row.metric_args.get("uncompressed")
    return value


def _evaluations(rows: list[Any]) -> str:
    lines = ["| text | protocol | perplexity | uncompressed |", "|---|---|---|---|"]
    for row in rows:
        args, before = row.metric_args, _uncompressed(row)
        text = " ".join(row.dataset_name.split()).replace("|", r"\|")
        how = f"{args['windows']} windows of {args['seqlen']} tokens, no overlap, BOS {args['bos']}, {args['dtype']}"
        lines.append(
            f"| {text} (sha256 `{row.dataset_revision[:16]}…`) | {how} | {row.metric_value:.3f} |"
            f" {'' if before is None else f'{before:.3f}'} |"
        )
    return "\n".join([*lines, "", "Measured by `swsc evaluate`; hashes in full stand in the front matter."])

"""`swsc evaluate MODEL --text FILE`: perplexity by the standard protocol."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from jobs.flags import add_settings, cluster_of, settings_of
from pipeline.config import ClusterSettings, EvaluateSettings
from pipeline.model.artifact import open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a dense, compressed or restored model")
    add_settings(parser, EvaluateSettings, ClusterSettings)
    parser.add_argument("--json", metavar="FILE", help="also write the result there")


def run(arguments: argparse.Namespace) -> int:
    (settings,) = settings_of(arguments, EvaluateSettings)
    cluster = cluster_of(arguments)
    open_model(arguments.model)  # a damaged model is told of before Ray is started
    if arguments.json:
        Path(arguments.json).touch()  # and so is a place that cannot be written
    from pipeline.flows.evaluate import evaluate_model
    from pipeline.run.cluster import make_pool

    result = evaluate_model(arguments.model, settings, partial(make_pool, cluster))
    summarise(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def summarise(result: dict[str, Any]) -> None:
    """The figure, and all that must be said beside it."""
    print(f"{result['model']}: perplexity {result['perplexity']:.4f}, {result['seconds']:.1f} s\n{protocol(result)}")


def protocol(result: dict[str, Any]) -> str:
    """How a perplexity was measured; without it the figure means nothing."""
    return (
        f"  {result['windows']} windows of {result['seqlen']} tokens, no overlap, BOS {result['bos']}, {result['dtype']}\n"
        f"  text {result['text']} (sha256 {result['text_sha256'][:16]}…, {result['text_tokens']} tokens)"
    )

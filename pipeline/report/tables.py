"""Tables for people: Markdown that reads well in a terminal and can be pasted into a README."""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.architectures.tensor_names import tensor_kind

_MOST = 300  # rows about tensors; more of them are shown kind by kind
_WIDTH = 200  # columns where there is no terminal that says how wide it is

# key of a row -> heading and format
COLUMNS: dict[str, tuple[str, str]] = {
    "model": ("model", ""),
    "variant": ("variant", ""),
    "name": ("tensor", ""),
    "tensors": ("tensors", "d"),
    "shape": ("shape", ""),
    "text": ("text", ""),
    "seqlen": ("L", ""),
    "paper_bits": ("paper bits", ".2f"),
    "bits_per_weight": ("true bits", ".3f"),
    "whole_model_bits_per_weight": ("whole-model bits", ".3f"),
    "relative_error": ("relative error", ".4f"),
    "mean_squared_error": ("mean squared error", ".3e"),
    "tuning": ("tuning", ""),
    "perplexity": ("perplexity", ".3f"),
    "reference": ("paper (Llama-2-7B)", ".3f"),
    "error": ("error", ""),
}


def print_table(rows: Iterable[Mapping[str, Any]], keys: Iterable[str], title: str = "") -> None:
    """Print the given keys of rows to standard output; columns that are empty in every row are left out.

    Rows that are about tensors come by model, in the order of layers; where they are very many, those whose names and
    shapes are alike but for numbers stand together, with the means of their figures.
    """
    keys, rows = tuple(keys), list(rows)
    if "name" in keys:
        rows = sorted(rows, key=_in_depth)
        if len(rows) > _MOST:
            rows, keys = _by_kind(rows), ("tensors", *keys)
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    table = Table(box=box.MARKDOWN, title=title or None, title_justify="left")
    for key in shown:
        heading, form = COLUMNS[key]
        table.add_column(heading, justify="right" if form else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(key), COLUMNS[key][1]) for key in shown))
    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def _by_kind(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        same = [str(row.get(key)) for key in ("model", "variant", "shape")]
        kinds.setdefault((tensor_kind(row["name"]), *same), []).append(row)
    return [_mean(kind[0], members) for kind, members in kinds.items()]


def _mean(name: str, members: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for several: means of figures, and what is the same in all."""
    figures = {key for row in members for key, value in row.items() if isinstance(value, float)}
    known = {key: [row[key] for row in members if row.get(key) is not None] for key in figures}
    means = {key: sum(values) / len(values) for key, values in known.items()}
    return {**members[0], **means, "name": name, "tensors": len(members)}


def _in_depth(row: Mapping[str, Any]) -> tuple[str, list[tuple[int, str]]]:
    """Sorts layer 2 before layer 10."""
    pieces = re.split(r"(\d+)", row["name"])
    return row.get("model", ""), [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "×".join(str(part) for part in value)
    return format(value, form) if form else str(value)

"""Tables on standard output, as Markdown that can be pasted into a document."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.architectures.tensor_names import tensor_kind

Row = Mapping[str, object]

# Tables of more matrices than this have one row per kind of matrix.
_MAX_ROWS = 300
# Width in characters of a table that is not printed to a terminal.
_WIDTH = 200

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
    "stage": ("stage", ""),
    "way": ("a worker holds", ""),
    "workers": ("workers", "d"),
    "host_gb": ("host GB", ",.1f"),
    "device_gb": ("GPU GB", ",.1f"),
    "read_gb": ("read GB", ",.1f"),
    "hidden_gb": ("hidden states GB", ",.2f"),
    "seconds": ("seconds", ",.0f"),
}


def print_table(rows: Iterable[Row], keys: Iterable[str], title: str = "") -> None:
    """Print the given keys of rows; a column without any value is left out.

    Rows with the key "name" are sorted by model and layer. If there are very many, rows whose names and shapes differ
    only in numbers are shown as one row with the means of their figures.
    """
    keys, rows = tuple(keys), list(rows)
    if "name" in keys:
        rows = sorted(rows, key=_layer_order)
        if len(rows) > _MAX_ROWS:
            rows, keys = _kinds(rows), ("tensors", *keys)
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    table = Table(box=box.MARKDOWN, title=title or None, title_justify="left")
    for key in shown:
        heading, form = COLUMNS[key]
        table.add_column(heading, justify="right" if form else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(key), COLUMNS[key][1]) for key in shown))
    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def _kinds(rows: Iterable[Row]) -> list[Row]:
    """One row per kind of matrix, model and variant."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kind = tensor_kind(str(row["name"]))
        kinds.setdefault((kind, *(str(row.get(key)) for key in ("model", "variant", "shape"))), []).append(row)
    return [_mean(kind[0], members) for kind, members in kinds.items()]


def _mean(name: str, rows: Sequence[Row]) -> Row:
    """One row for several: means of their figures, and values that all share."""
    keys = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    figures = {key: [value for row in rows if isinstance(value := row.get(key), int | float)] for key in keys}
    means = {key: sum(values) / len(values) for key, values in figures.items()}
    return {**rows[0], **means, "name": name, "tensors": len(rows)}


def _layer_order(row: Row) -> tuple[str, list[tuple[int, str]]]:
    """A sort key by which layer 2 comes before layer 10."""
    pieces = re.split(r"(\d+)", str(row["name"]))
    return str(row.get("model", "")), [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _cell(value: object, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "×".join(str(part) for part in value)
    return format(value, form) if form else str(value)

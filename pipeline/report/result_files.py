"""Result files of a sweep: JSON with everything, and Parquet for analysis."""

import io
import json
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.store import Store

RESULTS = ("results.json", "results.parquet", "tensors.parquet")


def write_results(
    store: Store,
    rows: Sequence[Mapping[str, object]],
    tensors: Sequence[Mapping[str, object]],
    header: Mapping[str, object],
) -> None:
    """Write results.json, results.parquet and tensors.parquet.

    Args:
        rows: one per variant and evaluation.
        tensors: one per variant and compressed matrix.
        header: settings and seconds of the sweep, which results.json holds, too.
    """
    table, by_run, by_tensor = RESULTS
    store.write_json(table, {**header, "rows": rows, "tensors": tensors})
    store.write(by_run, [_parquet(rows)])
    store.write(by_tensor, [_parquet(tensors)])


def _parquet(rows: Sequence[Mapping[str, object]]) -> memoryview:
    """A table with one column per key; nested values, which have no common type, are stored as JSON text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: pa.array([_plain(row.get(key)) for row in rows]) for key in keys}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getbuffer()


def _plain(value: object) -> object:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

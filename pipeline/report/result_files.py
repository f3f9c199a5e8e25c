"""Result files of a sweep: JSON for reading again, Parquet for analysis (one row a variant × evaluation or tensor)."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.store import Store

RESULTS = ("results.json", "results.parquet", "tensors.parquet")


def write_results(
    store: Store, rows: list[dict[str, Any]], tensors: list[dict[str, Any]], about: dict[str, Any]
) -> None:
    """Write results.json, results.parquet and tensors.parquet."""
    table, by_run, by_tensor = RESULTS
    store.write_json(table, {**about, "rows": rows, "tensors": tensors})
    store.write(by_run, [_parquet(rows)])
    store.write(by_tensor, [_parquet(tensors)])


def _parquet(rows: list[dict[str, Any]]) -> memoryview:
    """A table with a column a key; nested values that have no common type stand as JSON."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: pa.array([_plain(row.get(key)) for row in rows]) for key in keys}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getbuffer()


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value

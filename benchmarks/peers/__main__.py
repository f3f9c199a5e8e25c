"""Experiment: perplexity of one model quantized by other tools, measured with the protocol of `swsc evaluate`.

    python -m benchmarks.peers MODEL --text TEXT --calibration TEXT --out DIR --include '(q|k)_proj' --name 'Q & K'

Prints a Markdown table and writes all figures to DIR/results.json. Finished rows are reused, so the same command
resumes an interrupted run. CPU seconds and peak memory are those of the quantizing process; OMP_NUM_THREADS sets its
threads. Compare rows of equal true bits: the lower perplexity is better.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import print_markdown
from benchmarks.peers.arguments import parse
from benchmarks.peers.bench import Bench, RowFailure, read
from benchmarks.peers.calibration import calibration_tokens
from benchmarks.peers.environments import EnvironmentFailure
from benchmarks.peers.rows import HEADER, Row, cells, rows_of
from benchmarks.peers.script import Refusal, Shapes, selected
from pipeline.architectures.families import Family
from pipeline.checkpoints.source import open_checkpoint
from pipeline.errors import SwscError
from pipeline.texts.texts import read_text
from swsc_core.storage.json_fields import JsonObject


def main() -> int:
    given = parse(__doc__)
    try:
        bench = prepare(given)
    except (SwscError, Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = rows_of(given.peers, given.bits, given.group_sizes, given.autoround_iters)
    try:
        results = [measure(bench, row, given.name) for row in (None, *rows)]
    except KeyboardInterrupt:
        print("interrupted: finished rows are kept; run the same command again to resume", file=sys.stderr)
        return 130
    print_markdown(HEADER, map(cells, results))
    return 1 if any(result.get("failed") for result in results) else 0


def prepare(given: argparse.Namespace) -> Bench:
    """Check all arguments before anything expensive starts."""
    checkpoint = open_checkpoint(given.model)
    require_rows_of_outputs(Family(checkpoint.config), selected(given.model, given.include))
    file, digest = calibration_tokens(
        given.model, given.calibration, given.calibration_windows, given.calibration_seqlen, given.text, given.out
    )
    common = {
        "model": checkpoint.fingerprint,
        "include": given.include,
        "calibration": digest,
        "seqlen": given.seqlen,
        "windows": given.windows,
        "dtype": given.dtype,
        "text": hashlib.sha256(read_text(given.text).encode()).hexdigest(),
    }
    model, out = str(Path(given.model).absolute()), given.out.absolute()
    environments = (given.environments or out / "environments").absolute()
    return Bench(model, given.include, file.absolute(), common, protocol(given), out, environments, given.keep)


def require_rows_of_outputs(family: Family, shapes: Shapes) -> None:
    """Raise Refusal for matrices stored as [inputs, outputs]: the tools form groups along the last axis."""
    if transposed := [name for name in shapes if family.is_transposed(name)]:
        raise Refusal(
            f"{transposed[0]} is stored as [inputs, outputs], so the tools would group its weights along the outputs:"
            f" choose a model of another family than {family.name}, or a narrower --include"
        )


def protocol(given: argparse.Namespace) -> tuple[str, ...]:
    """Flags of `jobs evaluate`, which runs in another folder."""
    text = str(Path(given.text).absolute()) if Path(given.text).is_file() else given.text
    windows = ("--windows", str(given.windows)) if given.windows else ()
    cluster = ("--address", "local", "--workers", str(given.workers)) if given.workers else ("--local",)
    return ("--text", text, "--seqlen", str(given.seqlen), "--dtype", given.dtype, *windows, *cluster)


def measure(bench: Bench, row: Row | None, name: str) -> dict[str, Any]:
    """The result of a row, which is stored in results.json. A failed row has a reason, and is tried again next time."""
    label = row.label if row else "uncompressed"
    about = {"tensors": name if row else "", "label": label}
    try:
        result = {**bench.result(row), **about}
    except (RowFailure, EnvironmentFailure) as failure:
        print(f"{label}: {failure}", file=sys.stderr)
        return {**about, "reason": str(failure), "failed": not getattr(failure, "refused", False)}
    print(f"{label}: perplexity {result['evaluation']['perplexity']:.3f}", file=sys.stderr)
    store(bench.out / "results.json", result)
    return result


def store(file: Path, result: JsonObject) -> None:
    """Write a result to the file; it replaces an older result of the same key."""
    results = read(file) if file.is_file() else {}
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps({**results, str(result["key"]): result}, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    raise SystemExit(main())

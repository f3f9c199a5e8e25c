"""Experiment: one model quantized by rival tools, each measured by this project's own perplexity protocol.

    python -m benchmarks.peers MODEL --text TEXT --calibration CALIBRATION --out DIR --include '(q|k)_proj' --name 'Q & K'

Prints a Markdown table and keeps all figures in DIR/results.json. Finished rows are used again: an interrupted run goes on
with the same command. CPU seconds and peak memory are those of the quantizing process; set OMP_NUM_THREADS for both.
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
        print("interrupted: finished rows are kept; run the same command again to go on", file=sys.stderr)
        return 130
    print_markdown(HEADER, map(cells, results))
    return 1 if any(result.get("failed") for result in results) else 0


def prepare(given: argparse.Namespace) -> Bench:
    """Look at all that was given before anything costly begins."""
    checkpoint = open_checkpoint(given.model)
    require_rows_of_outputs(Family(checkpoint.config), selected(given.model, given.include))
    file, digest = calibration_tokens(
        given.model, given.calibration, given.calibration_windows, given.calibration_seqlen, given.text, given.out
    )
    common = {
        "model": checkpoint.fingerprint, "include": given.include, "calibration": digest, "seqlen": given.seqlen,
        "windows": given.windows, "dtype": given.dtype, "text": hashlib.sha256(read_text(given.text).encode()).hexdigest(),
    }  # fmt: skip
    model, out = str(Path(given.model).absolute()), given.out.absolute()
    environments = (given.environments or out / "environments").absolute()
    return Bench(model, given.include, file.absolute(), common, protocol(given), out, environments, given.keep)


def require_rows_of_outputs(family: Family, shapes: Shapes) -> None:
    """Refuse matrices [inputs, outputs]: the tools group weights along rows, which has to be along inputs."""
    if turned := [name for name in shapes if family.is_transposed(name)]:
        raise Refusal(
            f"{turned[0]} lies as [inputs, outputs] and the tools would group its weights along the outputs:"
            f" choose another model than one of family {family.name}, or leave it out of --include"
        )


def protocol(given: argparse.Namespace) -> tuple[str, ...]:
    """Flags of `jobs evaluate`, which runs elsewhere than here."""
    text = str(Path(given.text).absolute()) if Path(given.text).is_file() else given.text
    windows = ("--windows", str(given.windows)) if given.windows else ()
    where = ("--address", "local", "--workers", str(given.workers)) if given.workers else ("--local",)
    return ("--text", text, "--seqlen", str(given.seqlen), "--dtype", given.dtype, *windows, *where)


def measure(bench: Bench, row: Row | None, name: str) -> dict[str, Any]:
    """The result of a row, kept in results.json; a row without figures says why and is tried again next time."""
    label = row.label if row else "uncompressed"
    told = {"tensors": name if row else "", "label": label}
    try:
        result = {**bench.result(row), **told}
    except (RowFailure, EnvironmentFailure) as failure:
        print(f"{label}: {failure}", file=sys.stderr)
        return {**told, "reason": str(failure), "failed": not getattr(failure, "refused", False)}
    print(f"{label}: perplexity {result['evaluation']['perplexity']:.3f}", file=sys.stderr)
    keep(bench.out / "results.json", result)
    return result


def keep(file: Path, result: dict[str, Any]) -> None:
    """Put a result into the file, in place of an older one of the same key."""
    known = read(file) if file.is_file() else {}
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps({**known, result["key"]: result}, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    raise SystemExit(main())

"""`swsc plan MODEL`: what would happen, from headers alone."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from jobs.flags import add_config, add_settings, settings_of
from pipeline.config import CompressSettings
from pipeline.model.checkpoint import open_checkpoint
from pipeline.model.plan import Plan, make_plan
from pipeline.model.store import Store
from pipeline.report.tables import print_table
from swsc_core.spec import SwscSpec

_WORKER_BASE = 450 << 20  # bytes of a worker that holds no weights: Python, torch, Ray
_MATRICES = 7  # float32 copies of the largest matrix that are alive at the peak of a compression


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a safetensors checkpoint")
    add_config(parser)
    add_settings(parser, CompressSettings)
    parser.add_argument("--output", metavar="DIR", help="also say whether the disk of DIR has room")
    parser.add_argument("--json", metavar="FILE", help="also write the plan there")


def run(arguments: argparse.Namespace) -> int:
    (settings,) = settings_of(arguments, CompressSettings)
    source = open_checkpoint(arguments.model)
    plan = make_plan(source, settings)
    foretold = foretell(plan, settings.format)
    if arguments.output:
        foretold["free_bytes"] = Store.at(arguments.output).free_bytes()
    rows = [_row(decision) for decision in plan.decisions]
    if arguments.json:
        text = json.dumps({"tensors": rows, **foretold}, indent=1) + "\n"
        Path(arguments.json).write_text(text, encoding="utf-8")
    print_table(
        [row for row in rows if row["action"] == "compressed"], ["name", "shape", "paper_bits", "bits_per_weight"]
    )
    copied = [row for row in rows if row["action"] != "compressed"]
    print(f"{len(rows) - len(copied)} tensors compressed, {len(copied)} copied or tied")
    for key, value in foretold.items():
        print(f"{key}: {value:,.3f}" if isinstance(value, float) else f"{key}: {value:,}")
    if foretold.get("free_bytes", foretold["output_bytes"]) < foretold["output_bytes"]:
        print("the disk of the output has not enough room")
        return 1
    return 0


def _row(decision: Any) -> dict[str, Any]:
    bits = 8 * decision.stored_bytes / decision.info.count if decision.specs else None
    return {
        "name": decision.info.name,
        "action": decision.action,
        "reason": decision.reason,
        "shape": list(decision.info.shape),
        "method": decision.specs[0].method if decision.specs else None,
        "bits_per_weight": bits,
        "paper_bits": decision.paper_bits,
    }


def foretell(plan: Plan, form: str) -> dict[str, Any]:
    """Bytes, bits, peak memory of a worker, and seconds of one core at the GEMM speed measured now."""
    compressed = sum(decision.stored_bytes for decision in plan.compressed)
    count = sum(decision.info.count for decision in plan.compressed)
    return {
        "output_bytes": plan.stored_bytes_as(form),
        "compressed_bits_per_weight": 8 * compressed / count,
        "whole_model_bits_per_weight": 8 * plan.stored_bytes / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
        "worker_peak_bytes": _WORKER_BASE + _MATRICES * plan.largest_matrix_bytes,
        "core_seconds": _flop(plan) / _flop_per_second(),
    }


def _flop(plan: Plan) -> float:
    """Floating point operations of all matrices: the Gram matrix of K-Means and the products of the SVD dominate."""
    total = 0.0
    for decision in plan.compressed:
        m, n = decision.info.shape
        for spec in decision.specs:
            if isinstance(spec, SwscSpec):
                points = m if spec.channel_axis == "output" else n
                total += 2.0 * m * n * points * (spec.n_clusters > 0) + 40.0 * m * n * spec.rank
            else:
                total += 100.0 * m * n
    return total


def _flop_per_second() -> float:
    """Speed of a float32 GEMM on one core of this machine, measured for a moment."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    square = torch.ones(1024, 1024)
    square @ square
    started = time.perf_counter()
    for _ in range(3):
        square @ square
    seconds = (time.perf_counter() - started) / 3
    torch.set_num_threads(threads)
    return 2 * 1024**3 / seconds

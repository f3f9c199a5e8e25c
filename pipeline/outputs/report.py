"""swsc_report.json: what was done to each tensor, bits, seconds, memory and versions."""

import platform
import resource
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pipeline.outputs.report_rows import CompressedRow
from pipeline.planning.plan import Plan
from pipeline.redaction import redacted_argv


def build_report(
    plan: Plan, rows: Mapping[str, CompressedRow], seconds: float, peaks: dict[str, int], form: str
) -> dict[str, Any]:
    """The report of a compression.

    Args:
        rows: matrix -> what was measured of it.
        seconds: of the whole run.
        peaks: worker -> its peak resident memory, in bytes.
        form: of the output, "swsc" or "dense".
    """
    tensors = []
    for decision in plan.decisions:
        about: dict[str, Any] = {"name": decision.info.name, "action": decision.action, "reason": decision.reason}
        about |= {"shape": list(decision.info.shape), "method": None, **decision.location.to_json()}
        row = rows.get(decision.info.name)
        tensors.append(about | row.to_json() if row else about)
    return {
        "format": form,
        "tensors": tensors,
        **bit_totals(plan, rows),
        "seconds": seconds,
        "phases": _phases(rows),
        "peak_rss": {"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "workers": peaks},
        "versions": versions(),
        "argv": redacted_argv(),
    }


def bit_totals(plan: Plan, rows: Mapping[str, CompressedRow]) -> dict[str, float]:
    """Bits a weight over the compressed matrices and over the whole model, from stored bytes of the compact form."""
    stored = sum(row.stored_bytes for row in rows.values())
    count = sum(decision.info.count for decision in plan.compressed)
    copied = sum(decision.info.nbytes for decision in plan.decisions if decision.action == "copied")
    return {
        "compressed_bits_per_weight": 8 * stored / count,
        "whole_model_bits_per_weight": 8 * (stored + copied) / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
    }


def _phases(rows: Mapping[str, CompressedRow]) -> dict[str, float]:
    """Seconds of all workers together, by what they were spent on."""
    phases = {"read": sum(row.read_seconds for row in rows.values())}
    for row in rows.values():
        for key, value in row.stats.items():
            if key.endswith("_seconds"):
                name = key.removesuffix("_seconds")
                phases[name] = phases.get(name, 0.0) + value
    return phases


def versions() -> dict[str, str]:
    """What made an output."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("swsc", "torch", "ray")}


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # run from a checkout, as `ray job submit --working-dir .` does
        return "not installed"


def compressed_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of compressed tensors in a report, as JSON."""
    return [row for row in report["tensors"] if row["action"] == "compressed"]

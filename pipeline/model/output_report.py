"""swsc_report.json: what was done to each tensor, bits, seconds, memory and versions."""

import platform
import resource
from importlib.metadata import version
from typing import Any

from pipeline.model.addresses import command
from pipeline.model.plan import Plan


def build_report(
    plan: Plan, rows: dict[str, dict[str, Any]], seconds: float, peaks: dict[str, int], form: str
) -> dict[str, Any]:
    tensors = []
    for decision in plan.decisions:
        about: dict[str, Any] = {"name": decision.info.name, "action": decision.action, "reason": decision.reason}
        about |= {"shape": list(decision.info.shape), "method": None, **decision.location.to_json()}
        row = {key: value for key, value in rows.get(decision.info.name, {}).items() if key != "entry"}
        tensors.append({**about, **row})
    return {
        "format": form,
        "tensors": tensors,
        **bit_totals(plan, rows),
        "seconds": seconds,
        "phases": _phases(rows),
        "peak_rss": {"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "workers": peaks},
        "versions": versions(),
        "argv": command(),
    }


def bit_totals(plan: Plan, rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Bits a weight over the compressed matrices and over the whole model, from stored bytes of the compact form."""
    stored = sum(row["stored_bytes"] for row in rows.values())
    count = sum(decision.info.count for decision in plan.compressed)
    copied = sum(decision.info.nbytes for decision in plan.decisions if decision.action == "copied")
    return {
        "compressed_bits_per_weight": 8 * stored / count,
        "whole_model_bits_per_weight": 8 * (stored + copied) / plan.weights,
        "share_of_weights_compressed": count / plan.weights,
    }


def _phases(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds of all workers together, by what they were spent on."""
    phases = {"read": sum(row["read_seconds"] for row in rows.values())}
    for row in rows.values():
        for key in ("kmeans_seconds", "svd_seconds", "rtn_seconds"):
            if key in row["stats"]:
                name = key.removesuffix("_seconds")
                phases[name] = phases.get(name, 0.0) + row["stats"][key]
    return phases


def versions() -> dict[str, str]:
    """What made an output."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("swsc", "torch", "ray")}


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # run from a checkout, as `ray job submit --working-dir .` does
        return "not installed"


def compressed_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of compressed tensors in a report."""
    return [row for row in report["tensors"] if row["action"] == "compressed"]

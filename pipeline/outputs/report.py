"""The contents of swsc_report.json: what was done to each tensor, bits, seconds, memory and versions."""

import platform
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from pipeline.outputs.report_rows import CompressedRow, JsonRow
from pipeline.planning.plan import Decision, Plan
from pipeline.redaction import redacted_argv

# Key of a report: name of the digests that all bytes read from the source were verified against.
VERIFIED_SOURCE = "verified_source"


@dataclass(frozen=True)
class CompressionReport:
    """The report of a compression.

    Attributes:
        rows: measurements of the compressed matrices, by name.
        form: of the output, "swsc" or "dense".
        seconds: duration of the whole run.
        peak_rss: worker -> its peak resident memory, in bytes.
        left_out: files of the source that the output does not contain -> reason.
        arithmetic: what the bytes of the output depend on beside the settings.
        files_of_an_earlier_run: number of files that were finished when the run resumed.
        dequantized_from: the GGUF file from which the source was dequantized.
        verified_source: see VERIFIED_SOURCE; None if the source was not verified.
    """

    plan: Plan
    rows: Mapping[str, CompressedRow]
    form: str
    seconds: float
    peak_rss: Mapping[str, int]
    left_out: Mapping[str, str]
    arithmetic: Mapping[str, object]
    files_of_an_earlier_run: int
    dequantized_from: Mapping[str, object] | None = None
    verified_source: str | None = None

    def to_json(self) -> dict[str, object]:
        """The report as JSON. Keys of optional facts are present only where they apply."""
        optional = {"dequantized_from": self.dequantized_from, VERIFIED_SOURCE: self.verified_source}
        return {
            "format": self.form,
            "tensors": [_row(decision, self.rows.get(decision.info.name)) for decision in self.plan.decisions],
            **bit_totals(self.plan, self.rows),
            "seconds": self.seconds,
            "phases": _phases(self.rows),
            "peak_rss": {"driver": _driver_peak_rss(), "workers": self.peak_rss},
            "versions": versions(),
            "argv": redacted_argv(),
            "left_out": self.left_out,
            "arithmetic": self.arithmetic,
            "files_of_an_earlier_run": self.files_of_an_earlier_run,
            **{key: value for key, value in optional.items() if value},
        }


def _row(decision: Decision, measured: CompressedRow | None) -> JsonRow:
    """What was done to one tensor, with the measurements of a compressed matrix."""
    return {
        "name": decision.info.name,
        "action": decision.action,
        "reason": decision.reason,
        "shape": list(decision.info.shape),
        "method": None,
        **decision.location.to_json(),
        **(measured.to_json() if measured else {}),
    }


def _driver_peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bit_totals(plan: Plan, rows: Mapping[str, CompressedRow]) -> dict[str, float]:
    """Bits per weight over the compressed matrices and over the whole model, from the stored bytes of format swsc."""
    stored_bytes = sum(row.stored_bytes for row in rows.values())
    weights = sum(decision.info.count for decision in plan.compressed)
    copied_bytes = sum(decision.info.nbytes for decision in plan.decisions if decision.action == "copied")
    return {
        "compressed_bits_per_weight": 8 * stored_bytes / weights,
        "whole_model_bits_per_weight": 8 * (stored_bytes + copied_bytes) / plan.weights,
        "share_of_weights_compressed": weights / plan.weights,
    }


def _phases(rows: Mapping[str, CompressedRow]) -> dict[str, float]:
    """Seconds of all workers together, by phase of the compression."""
    phases = {"read": sum(row.read_seconds for row in rows.values())}
    for row in rows.values():
        for key, value in row.stats.items():
            if key.endswith("_seconds"):
                phase = key.removesuffix("_seconds")
                phases[phase] = phases.get(phase, 0.0) + value
    return phases


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine an output."""
    return {"python": platform.python_version()} | {name: _version(name) for name in ("swsc", "torch", "ray")}


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # run from a checkout, as `ray job submit --working-dir .` does
        return "not installed"

"""The rows of the table: tools and settings, the key of a finished row, and the printed cells."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.script import CHANNEL, WHOLE_TENSOR
from swsc_core.storage.json_fields import JsonObject

HEADER = ("tensors", "tool", "settings", "nominal bits", "true bits", "perplexity", "CPU seconds", "peak memory, GB")

# What a perplexity depends on.
MEASURED = ("model", "text", "seqlen", "windows", "dtype")


@dataclass(frozen=True)
class Peer:
    """A tool: its script, its environment (None: the environment of the benchmark), and flags of the script."""

    script: str
    environment: str | None
    flags: tuple[str, ...] = ()


PEERS = {
    "rtn": Peer("quantize_rtn", None),
    "hqq": Peer("quantize_hqq", "hqq"),
    "hqq-axis0": Peer("quantize_hqq", "hqq", ("--axis", "0")),
    "gptq": Peer("quantize_llmcompressor", "llmcompressor", ("--method", "gptq")),
    "awq": Peer("quantize_llmcompressor", "llmcompressor", ("--method", "awq")),
    "autoround": Peer("quantize_autoround", "autoround"),
    "autoround-ext": Peer("quantize_autoround", "autoround", ("--extension",)),
    "quanto": Peer("quantize_quanto", "quanto"),
}
DEFAULT = ("rtn", "hqq", "gptq", "awq", "autoround", "quanto")


@dataclass(frozen=True)
class Row:
    """One run of one tool."""

    peer: str
    bits: int
    group_size: int
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name in messages and of the folder."""
        group = {WHOLE_TENSOR: "tensor", CHANNEL: "channel"}.get(self.group_size, f"g{self.group_size}")
        return f"{self.peer}-{self.bits}bit-{group}"


def rows_of(peers: Iterable[str], bits: Iterable[int], groups: Sequence[int], autoround_iters: int) -> list[Row]:
    """All rows, tool by tool. RTN also has rows with one scale per matrix and one per row."""
    extra_flags = {"quantize_autoround": ("--iters", str(autoround_iters))}
    rtn_groups = list(dict.fromkeys((WHOLE_TENSOR, CHANNEL, *groups)))
    return [
        Row(peer, width, group, (*PEERS[peer].flags, *extra_flags.get(PEERS[peer].script, ())))
        for peer in peers
        for width in bits
        for group in (rtn_groups if peer == "rtn" else groups)
    ]


def key(row: Row | None, common: JsonObject, requirements: str) -> str:
    """Key of a row: digest of its settings, of the requirements of its tool, and of the settings that all rows share.

    The key of the uncompressed model (None) depends only on the settings of the measurement.
    """
    if row is None:
        common = {name: common[name] for name in MEASURED}
    identity = {"row": row and asdict(row), "common": common, "requirements": requirements}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table. A row that a tool refused, or that failed, has a reason in place of figures."""
    if "reason" in result:
        return (result["tensors"], result["label"], result["reason"], *[""] * (len(HEADER) - 3))
    peer = result["peer"]
    settings = {name: formatted(value) for name, value in peer["settings"].items()}
    nominal = settings.pop("bits", "")
    return (
        result["tensors"],
        f"{peer['tool']} {peer['version']}".strip(),
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        nominal,
        figure(peer["bits_per_weight"], ".3f"),
        figure(result["evaluation"]["perplexity"], ".3f"),
        figure(peer["cpu_seconds"], ".0f"),
        figure(peer["peak_rss"] and peer["peak_rss"] / 1e9, ".2f"),
    )


def formatted(setting: Any) -> str:
    return "×".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def figure(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)

"""The rows of the table: which tool runs with which settings, by what key a finished row is known, how it is printed."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.peers.script import CHANNEL, WHOLE_TENSOR

HEADER = ("tensors", "tool", "settings", "nominal bits", "true bits", "perplexity", "CPU seconds", "peak memory, GB")

MEASURED = ("model", "text", "seqlen", "windows", "dtype")  # what a perplexity depends on


@dataclass(frozen=True)
class Peer:
    """A tool: its script, its environment (None: the driver's own), and flags of the script."""

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
        """A name for people and for a folder."""
        group = {WHOLE_TENSOR: "tensor", CHANNEL: "channel"}.get(self.group_size, f"g{self.group_size}")
        return f"{self.peer}-{self.bits}bit-{group}"


def rows_of(peers: Iterable[str], bits: Iterable[int], groups: Sequence[int], autoround_iters: int) -> list[Row]:
    """All rows, tool by tool; RTN also with one scale a matrix and one a row."""
    more = {"quantize_autoround": ("--iters", str(autoround_iters))}
    own = list(dict.fromkeys((WHOLE_TENSOR, CHANNEL, *groups)))
    return [
        Row(peer, width, group, (*PEERS[peer].flags, *more.get(PEERS[peer].script, ())))
        for peer in peers
        for width in bits
        for group in (own if peer == "rtn" else groups)
    ]


def key(row: Row | None, common: dict[str, Any], requirements: str) -> str:
    """What a finished row is known by: its settings, the versions of its tool, and what it shares with other rows.

    The uncompressed model (None) shares only what it is measured with.
    """
    if row is None:
        common = {name: common[name] for name in MEASURED}
    what = {"row": row and asdict(row), "common": common, "requirements": requirements}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table; a row that a tool refused, or that failed, has a reason in place of figures."""
    if "reason" in result:
        return (result["tensors"], result["label"], result["reason"], *[""] * (len(HEADER) - 3))
    peer = result["peer"]
    settings = {name: told(value) for name, value in peer["settings"].items()}
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


def told(setting: Any) -> str:
    return "×".join(map(str, setting)) if isinstance(setting, list) else str(setting)


def figure(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)

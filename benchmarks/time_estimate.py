"""Claim: `swsc plan` estimates the time of a compression within a factor of 1.5, also on shapes it was not fitted to.

    python -m benchmarks.time_estimate

The constants (pipeline/planning/time_model.py) were fitted to the 4096×4096 matrices of benchmarks/llama7b_shape.py.
This script plans and compresses matrices of other models' shapes, square and not, at other bits, along the other axis
and by segments, with `--local`. It prints the estimated and the measured time of each.

Good result, exit code 0: every ratio of the two is between 1/1.5 and 1.5.
"""

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import print_markdown, structured_weight
from jobs.cli import main as swsc
from pipeline.checkpoints.weight_files import SINGLE
from pipeline.storage.store import Store
from swsc_core.storage.safetensors_header import build_header

LIMIT = 1.5


@dataclass(frozen=True)
class Case:
    """Q and K of some layers of a model whose keys may be narrower than its queries."""

    name: str
    hidden: int
    keys: int
    layers: int
    flags: tuple[str, ...]


PAPER = ("--count", "paper", "--bits")
CASES = [
    Case("Llama-3.2-1B, 3 bits", 2048, 512, 4, (*PAPER, "3")),
    Case("Llama-3.2-1B, 2 bits, input channels", 2048, 512, 4, (*PAPER, "2", "--channel-axis", "input")),
    Case("Llama-3.2-3B, 2 bits", 3072, 1024, 2, (*PAPER, "2")),
    Case("Llama-2-13B, 3 bits", 5120, 5120, 1, (*PAPER, "3")),
    Case(
        "Llama-3.2-3B, segments", 3072, 1024, 2, ("--clusters", "256", "--rank", "0", "--segment-size", "4", "--scaled")
    ),
]


def make(case: Case, directory: str) -> None:
    """Write a checkpoint that contains only the measured matrices."""
    rows = {"q": case.hidden, "k": case.keys}
    tensors = {
        f"model.layers.{layer}.self_attn.{role}_proj.weight": structured_weight(m, case.hidden, seed=2 * layer + m)
        for layer in range(case.layers)
        for role, m in rows.items()
    }
    values = {name: weight.bfloat16().view(torch.uint8).numpy() for name, weight in tensors.items()}
    header = build_header((name, "BF16", tuple(weight.shape), 2 * weight.numel()) for name, weight in tensors.items())
    store = Store.at(directory)
    store.write(SINGLE, [header, *(value.data.cast("B") for value in values.values())])
    store.write_json("config.json", {"model_type": "llama", "hidden_size": case.hidden})


def measure(case: Case, folder: Path) -> tuple[float, float]:
    """Estimated and measured seconds, on one core."""
    model, output, plan = str(folder / "model"), str(folder / "out"), str(folder / "plan.json")
    make(case, model)
    with contextlib.redirect_stdout(io.StringIO()):
        for command in (["plan", model, "--json", plan], ["compress", model, output]):
            if swsc([*command, *case.flags, "--local"]):
                raise SystemExit(f"{case.name}: {command[0]} failed")
    estimated = json.loads(Path(plan).read_text())["core_seconds"]
    return estimated, json.loads(Path(output, "swsc_report.json").read_text())["seconds"]


def main() -> None:
    rows: list[tuple[str, str, float, float, float]] = []
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="time-estimate") as folder:
            estimated, seconds = measure(case, Path(folder))
        rows.append(
            (
                case.name,
                f"{case.hidden}×{case.hidden}, {case.keys}×{case.hidden}",
                estimated,
                seconds,
                estimated / seconds,
            )
        )
    print_markdown(["model", "Q, K", "estimated s", "measured s", "ratio"], rows)
    raise SystemExit(any(not 1 / LIMIT <= ratio <= LIMIT for *_, ratio in rows))


if __name__ == "__main__":
    main()

"""Claim: a worker that uses the metric of activations holds at most 6 float32 copies of its matrix besides the Hessian.

    python -m benchmarks.memory

Each shape runs in its own process. The worker reads a float16 matrix and its Hessian from files, as in a run, and
compresses it. The result is the growth of peak resident memory, minus the Hessian [n, n], in units of the float32
matrix.

Good result, exit code 0: at most 6 copies for every shape.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import print_markdown, timed
from pipeline.calibration.hessian_store import HessianRow, Hessians, StoredHessian
from pipeline.checkpoints.checkpoint import RUN, read_header
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.compression.job import CompressLayer
from pipeline.engine.worker import Worker
from pipeline.planning.tasks import LayerTask
from pipeline.storage.store import Store
from swsc_core import SwscSpec

_LIMIT = 6.0
_SHAPES = ((4096, 4096, 0), (4096, 4096, 32), (4096, 11008, 0), (2048, 5504, 0))


def resident(field: str) -> int:
    """VmRSS (present) or VmHWM (peak) resident memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def write(folder: Path, name: str, m: int, n: int) -> None:
    """Write a random matrix and its Hessian, in the files of a checkpoint and of a calibration."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, n, generator=generator)
    hessian = inputs.T @ inputs
    save_file(
        {f"{name}.weight": torch.randn(m, n, generator=generator).mul_(0.02).half()},
        folder / f"{name}-model.safetensors",
    )
    parts = {"plain": hessian, "weighted": hessian.clone(), "rows": torch.ones(m)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, folder / f"{name}-hessian.safetensors")
    Store(str(folder)).write_json(RUN, {"windows": [8, 512]})


def stored_hessian(name: str) -> StoredHessian:
    """The record of what `write` has written."""
    row = HessianRow(f"{name}.weight", tokens=4096, owner=f"{name}.weight", sha256="0" * 64)
    return StoredHessian(f"{name}-hessian.safetensors", row)


def measure(folder: Path, m: int, n: int, rank: int) -> None:
    """Print the peak in copies of the matrix, without the Hessian, and the seconds."""
    spec = SwscSpec(
        256,
        rank,
        segment_size=4,
        scaled=True,
        metric="activations",
        feedback=True,
        rounds=1,
        centroid_bits=8,
        factor_bits=8 if rank else None,
    )
    store, worker = Store(str(folder)), Worker(1, "cpu")
    small, large = (
        LayerTask(
            "a layer",
            "layer.safetensors",
            ((whole_matrix(read_header(store, f"{name}-model.safetensors")[1][0]), (spec,)),),
        )
        for name in ("small", "large")
    )
    stored = {f"{name}.weight": stored_hessian(name) for name in ("small", "large")}
    hessians = Hessians(store, gradient_share=0.5, stored=stored)
    worker.run(CompressLayer(store, small, "swsc", 0, None, hessians))  # libraries allocate in their first call
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    _, seconds = timed(lambda: worker.run(CompressLayer(store, large, "swsc", 0, None, hessians)))
    print((resident("VmHWM") - before - 4 * n * n) / (4 * m * n), seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("M", "N", "RANK"), help="measure one shape")
    parser.add_argument("--folder", type=Path, help="folder with its files")
    arguments = parser.parse_args()
    if arguments.shape:
        measure(arguments.folder, *arguments.shape)
        return 0
    rows = []
    for m, n, rank in _SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), "small", 64, 128)
            write(Path(folder), "large", m, n)
            command = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                "--folder",
                folder,
                "--shape",
                *map(str, (m, n, rank)),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        copies, seconds = map(float, done.stdout.split())
        rows.append((f"{m}×{n}", rank, copies, seconds))
    print_markdown(("shape", "rank", "copies of the matrix besides the Hessian", "seconds"), rows)
    return 0 if all(copies <= _LIMIT for _, _, copies, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

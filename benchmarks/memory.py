"""Claim: a worker that compresses by activations holds at most 6 copies of its matrix in float32 beside the second moment.

Each shape runs in a process of its own. A worker reads the matrix (float16) and its moments from files as in a run; counted
is the peak of resident memory less what the worker had before, in matrices, once the moment [n, n] is taken off.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import print_markdown, timed
from pipeline.calibration.hessian_store import Hessians, hessian_file
from pipeline.checkpoints.checkpoint import RUN, read_header
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER
from pipeline.compression.job import CompressLayer
from pipeline.engine.worker import Worker
from pipeline.planning.plan import LayerTask
from pipeline.storage.store import Store
from swsc_core import SwscSpec

_LIMIT = 6.0
_SHAPES = ((4096, 4096, 0), (4096, 4096, 32), (4096, 11008, 0), (2048, 5504, 0))


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def write(folder: Path, name: str, m: int, n: int) -> None:
    """A random matrix and its moments, as a checkpoint and a calibration have them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, n, generator=generator)
    moment = inputs.T @ inputs
    save_file(
        {f"{name}.weight": torch.randn(m, n, generator=generator).mul_(0.02).half()},
        folder / f"{name}-model.safetensors",
    )
    parts = {"plain": moment, "weighted": moment.clone(), "rows": torch.ones(m)}
    file = hessian_file(f"{name}.weight")
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, folder / file)
    row = {"name": f"{name}.weight", "owner": f"{name}.weight", "tokens": 4096}
    store = Store(str(folder))
    store.write_json(f"{FINISHED_FOLDER}/{file}.json", {"rows": [row]})
    store.write_json(RUN, {"windows": [8, 512]})


def measure(folder: Path, m: int, n: int, rank: int) -> None:
    """Print the peak in copies of the matrix, the moment left out, and seconds."""
    spec = SwscSpec(
        256, rank, segment_size=4, scaled=True, metric="activations", feedback=True, rounds=1,
        centroid_bits=8, factor_bits=8 if rank else None,
    )  # fmt: skip
    store, worker = Store(str(folder)), Worker(1, "cpu")
    small, large = (
        LayerTask(
            "a layer",
            "layer.safetensors",
            ((whole_matrix(read_header(store, f"{name}-model.safetensors")[1][0]), (spec,)),),
        )
        for name in ("small", "large")
    )
    hessians = Hessians(store, gradient_share=0.5)
    worker.run(CompressLayer(store, small, "swsc", 0, None, hessians))  # libraries allocate on their first call
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    _, seconds = timed(lambda: worker.run(CompressLayer(store, large, "swsc", 0, None, hessians)))
    print((resident("VmHWM") - before - 4 * n * n) / (4 * m * n), seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("M", "N", "RANK"), help="of one measurement")
    parser.add_argument("--folder", type=Path, help="where its files are")
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
    print_markdown(("shape", "rank", "copies of the matrix beside the moment", "seconds"), rows)
    return 0 if all(copies <= _LIMIT for _, _, copies, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: tasks of a 671B mixture read, compute and write at most 2 GB, and the driver stays below 1 GB.

    python -m benchmarks.huge_headers DIR

Writes a checkpoint in the shape of DeepSeek-V3 below DIR as sparse files (61 layers, 256 experts; a few MB of disk),
plans it (`--preset best`, all projections), and counts, without computing anything:

- the tasks of each stage, their largest input and output, and the bytes of the largest task that the driver sends. The
  calibration is scheduled with results that are made up, 65,536 tokens in 8 shards.
- the requests to an object store, from those that tiny files cause (`counted_requests.py`).

"before" stands for one file per layer, and one file of Hessians per matrix.

Good result, exit code 0: no file has more than 2 GiB, plan and driver stay below 1 GB.
"""

import argparse
import math
import pickle
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np

from benchmarks.common import print_markdown
from benchmarks.counted_requests import Requests, count_requests
from benchmarks.plan import deepseek_671b, make, planned
from pipeline.architectures.tensor_info import TensorInfo
from pipeline.calibration import hessian_store
from pipeline.calibration.flow import Calibration, CalibrationInputs
from pipeline.calibration.gathering import AddKey, Gathering, LayerRange, WindowShards
from pipeline.calibration.hessian_store import HessianRow, Hessians, complete
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.source import open_checkpoint
from pipeline.engine.task import Task, TaskResult
from pipeline.models.loading import ModelKey
from pipeline.models.stored_model import Model
from pipeline.outputs.transaction import Output
from pipeline.planning import tasks
from pipeline.planning.memory import hessian_bytes, layer_compression_memory, restoring_memory
from pipeline.planning.plan import Plan, make_plan
from pipeline.restoring import plan as restoring
from pipeline.restoring.plan import RestorePlan, make_restore_plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.compression import CompressSettings
from pipeline.storage.store import Store
from swsc_core.compressed.config_json import part_name
from swsc_core.compressed.entry import Entry, RtnEntry

ROOT = Path(__file__).parents[1]
_WINDOWS, _SEQLEN, _SHARD = 128, 512, 16
_PEAK_BYTES = 1e9
_UNBOUNDED = 1 << 60
# Requests of a compression before, counted in the same way on commit 6b29492.
_BEFORE = Requests(per_file=19, per_matrix=43)


def compression(source: Checkpoint, dense: bool) -> Plan:
    settings = CompressSettings(include="_proj", preset="best", bits=2.25)
    return make_plan(source, settings, dense)


def restoration(source: Checkpoint, plan: Plan) -> RestorePlan:
    """The plan of `swsc restore` for an output whose matrices are all compressed."""
    tensors = dict(source.tensors)
    entries: dict[str, Entry] = {}
    for decision in plan.compressed:
        info = decision.matrix
        entries[info.name] = RtnEntry(info.shape, "bfloat16", 2, "channel", True)
        for part in entries[info.name].part_shapes():
            name = part_name(info.name, part)
            tensors[name] = TensorInfo(name, "U8", (1,), "model.safetensors", 0, 1)
    return make_restore_plan(Model(Checkpoint(source.store, tensors, source.config), entries), {})


def calibrated(source: Checkpoint, plan: Plan) -> tuple[Counter[str], list[LayerRange], Hessians]:
    """Tasks of a calibration by kind, its ranges, and what the driver knows of the Hessians afterwards."""
    matrices = [decision.matrix for decision in plan.compressed]
    ids = np.zeros((_WINDOWS, _SEQLEN), dtype=np.int64)
    with tempfile.TemporaryDirectory() as cache:
        inputs = CalibrationInputs(source, matrices, ids, 0)
        ranges = Calibration(inputs, CalibrationSettings(), cache)._ranges(matrix.name for matrix in matrices)
        output = cast(Output, SimpleNamespace(store=Store.at(cache), ticket=None))
        gathering = Gathering(ModelKey("model", "auto", 1), WindowShards(ids, _SHARD, 0), output)
        gathering.start_pass(ranges)
        names = {part.file: part.names for each in ranges for part in each.parts}
        kinds: Counter[str] = Counter()
        while task := gathering.next(0):
            kinds[task.kind] += 1
            gathering.done(_made_up(task, names))
    return kinds, ranges, Hessians(Store.at("/cache"), 0.5, complete(gathering.written))


def _made_up(task: Task[Any], names: dict[str, tuple[str, ...]]) -> TaskResult[Any]:
    """A result with handles instead of payloads, and with records instead of sums."""
    if hasattr(task.key, "file"):
        rows = tuple(HessianRow(name, 1, name, "0" * 64) for name in names[task.key.file])
        return TaskResult(task, rows)
    return TaskResult(task, None if isinstance(task.key, AddKey) else {}, tuple(map(str, range(task.outputs))))


class Layout(NamedTuple):
    """Plans and tasks with one size of files.

    Attributes:
        kinds: tasks of the calibration by kind.
        sums: bytes of the Hessians in each file.
    """

    plan: Plan
    dense: Plan
    restored: RestorePlan
    kinds: Counter[str]
    sums: list[int]
    hessians: Hessians


def layout(source: Checkpoint) -> Layout:
    plan = compression(source, False)
    kinds, ranges, hessians = calibrated(source, plan)
    infos = {decision.info.name: decision.matrix for decision in plan.compressed}
    sums = [hessian_bytes(infos[name] for name in part.names) for each in ranges for part in each.parts]
    return Layout(plan, compression(source, True), restoration(source, plan), kinds, sums, hessians)


def count(folder: Path) -> bool:
    """Print tasks and requests of the stages, and return whether tasks and this process stay within the limits."""
    source = open_checkpoint(str(folder))
    with ExitStack() as stack:
        for module, name in ((tasks, "FILE_BYTES"), (restoring, "FILE_BYTES"), (hessian_store, "_FILE_BYTES")):
            stack.enter_context(mock.patch.object(module, name, _UNBOUNDED))
        before = layout(source)
    now = layout(source)
    _print_tasks(before, now)
    _print_requests(before, now)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    records = [len(pickle.dumps(now.hessians.of(info.name for info, _ in layer.items))) for layer in now.plan.layers]
    in_all = len(pickle.dumps(now.hessians))
    print(f"\nrecords of Hessians: {in_all / 1e6:.1f} MB in the driver, at most {max(records) / 1e3:.1f} kB in a task")
    print(f"peak memory of this process, with all plans of both layouts: {peak / 1e9:.2f} GB")
    layers = [layer.nbytes for layer in (*now.plan.layers, *now.dense.layers)]
    return max(*layers, now.restored.largest_file_bytes) <= tasks.FILE_BYTES and peak < _PEAK_BYTES


def _print_tasks(before: Layout, now: Layout) -> None:
    matrices, ours = len(before.plan.compressed), ("GatherHessians", "AddHessians", "KeepHessians")
    gather, add, keep = ((before.kinds[kind], now.kinds[kind]) for kind in ours)
    matrix_sums = max(hessian_bytes([decision.matrix]) for decision in now.plan.compressed)
    rows = [
        ["gather windows", *gather, *"----"],
        ["add shards of Hessians", *add, *_in_gb(max(before.sums), max(now.sums)), *"--"],
        ["write Hessians", matrices, keep[1], *_in_gb(matrix_sums, max(now.sums)), *"--"],
        ["compress", *_compressing(before.plan, now.plan)],
        ["compress, dense form", *_compressing(before.dense, now.dense)],
        ["restore", *_restoring(before.restored, now.restored)],
    ]
    sides = ("tasks", "largest file or sum, GB", "estimated memory of a worker, GB")
    print_markdown(["stage", *(f"{side}{when}" for side in sides for when in (" before", ""))], rows)


def _in_gb(*sizes: int) -> list[float]:
    return [size / 1e9 for size in sizes]


def _compressing(*plans: Plan) -> list[object]:
    sizes = [plan.largest_file_bytes for plan in plans]
    memory = [layer_compression_memory(plan).cpu for plan in plans]
    return [*map(_files, plans), *_in_gb(*sizes), *_in_gb(*memory)]


def _restoring(*plans: RestorePlan) -> list[object]:
    sizes = [plan.largest_file_bytes for plan in plans]
    largest = [max(plan.model.count(name) for task in plan.restored for name in task.names) for plan in plans]
    memory = [restoring_memory(*size).cpu for size in zip(largest, sizes, strict=True)]
    return [*(len(plan.restored) + len(plan.copied) for plan in plans), *_in_gb(*sizes), *_in_gb(*memory)]


def _files(plan: Plan) -> int:
    return len(plan.layers) + len(plan.copies)


def _print_requests(before: Layout, now: Layout) -> None:
    requests, matrices = count_requests(), len(now.plan.compressed)
    hashed, sums = requests["resume, verify: hash"], (matrices, len(now.sums))
    compressing = requests["compress: read, compress, write"]
    writing = requests["calibrate: write Hessians"]
    rows = [
        ["write Hessians", *_totals(writing, writing, sums, matrices)],
        ["compress", *_totals(_BEFORE, compressing, (len(before.plan.layers), len(now.plan.layers)), matrices)],
        ["hash the output", *_totals(hashed, hashed, (_files(before.plan), _files(now.plan)), matrices)],
        ["hash the Hessians", *_totals(hashed, hashed, sums, matrices)],
    ]
    columns = ("requests per file + per matrix", "files", "requests")
    print()
    print_markdown(["stage", *(f"{column}{when}" for column in columns for when in (" before", ""))], rows)


def _totals(before: Requests, now: Requests, files: tuple[int, int], matrices: int) -> list[object]:
    """The cells of a row: requests per file and matrix, files, and requests, each before and now."""
    each = [f"{requests.per_file} + {requests.per_matrix}" for requests in (before, now)]
    return [*each, *files, before.total(files[0], matrices), now.total(files[1], matrices)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder / "DeepSeek-V3"
    if arguments.count:
        raise SystemExit(not count(folder))
    config, shapes = deepseek_671b()
    make(folder, config, shapes)
    seconds, peak, output = planned(folder)
    weights = sum(map(math.prod, shapes.values()))
    print(f"{len(shapes)} tensors, {weights / 1e9:.0f}e9 weights; {output}")
    print(f"`swsc plan`: {seconds:.1f} s, {peak / 1e9:.2f} GB\n", flush=True)
    command = [sys.executable, "-m", "benchmarks.huge_headers", str(arguments.folder), "--count"]
    counted = subprocess.run(command, cwd=ROOT, check=False)
    raise SystemExit(counted.returncode != 0 or peak >= _PEAK_BYTES)


if __name__ == "__main__":
    main()

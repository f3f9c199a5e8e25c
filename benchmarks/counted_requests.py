"""Requests to an object store that the stages of a run make per file and per matrix, counted on the wire.

The files are tiny: the number of requests does not depend on the size of a tensor below 8 MiB, the length of one read.
Each number is read once, as over https.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.object_store import counted_store, reading
from pipeline.calibration.hessian_store import HessianRow, Hessians, StoredHessian
from pipeline.checkpoints.checkpoint import RUN, read_header
from pipeline.checkpoints.matrix_info import whole_matrix
from pipeline.checkpoints.tensor_io import Payload, commit, file_differences, to_stored_tensor
from pipeline.compression.job import CompressLayer
from pipeline.engine.task import JobContext
from pipeline.planning.tasks import LayerTask
from pipeline.storage.lease import Ticket, acquire_lease
from pipeline.storage.store import FileRecord, Store
from swsc_core import SwscSpec
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import BUCKET

_SIDE = 64
# Numbers of matrices in a file, from which the requests per file and per matrix follow.
_FEW, _MANY = 1, 3
_SPEC = SwscSpec(8, 0, segment_size=4, metric="activations")


class Requests(NamedTuple):
    """Requests of a stage."""

    per_file: int
    per_matrix: int

    def total(self, files: int, matrices: int) -> int:
        """Requests for `files` files of `matrices` matrices in all."""
        return files * self.per_file + matrices * self.per_matrix


def count_requests() -> dict[str, Requests]:
    """Requests of each stage."""
    with (
        tempfile.TemporaryDirectory(prefix="requests") as folder,
        counted_store(Path(folder)) as proxy,
        reading("once"),
    ):
        few, many = (dict(_counts(proxy, n)) for n in (_FEW, _MANY))
    slopes = {stage: (many[stage] - few[stage]) // (_MANY - _FEW) for stage in few}
    return {stage: Requests(few[stage] - _FEW * slopes[stage], slopes[stage]) for stage in few}


def _counts(proxy: FaultProxy, n: int) -> Iterator[tuple[str, int]]:
    """Requests of each stage for one file of `n` matrices."""
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(n)]
    with _leased(Store.at(f"{BUCKET}/cache-{n}")) as cache, _leased(Store.at(f"{BUCKET}/output-{n}")) as output:
        cache.store.write_json(RUN, {"windows": [1, 1]})
        record = commit(cache, "source.safetensors", Payload(_weights(names)))
        layer = _layer(cache.store, names)

        def write_hessians() -> FileRecord:
            return commit(cache, "hessians.safetensors", Payload(_sums(names)))

        def compress() -> FileRecord:
            job = CompressLayer(cache.store, layer, "swsc", 0, None, _hessians(cache.store, names))
            return commit(output, layer.file, job.run(JobContext("cpu", 1)).payloads[0])

        yield "calibrate: write Hessians", _counted(proxy, write_hessians)
        yield "compress: read, compress, write", _counted(proxy, compress)
        yield (
            "resume, verify: hash",
            _counted(proxy, lambda: file_differences(cache.store, record.name, record.to_json())),
        )


@contextmanager
def _leased(store: Store) -> Iterator[Ticket]:
    with acquire_lease(store, sleep=lambda seconds: None) as lease:
        yield lease.ticket


def _counted(proxy: FaultProxy, call: Callable[[], Any]) -> int:
    before = proxy.requests
    call()
    return proxy.requests - before


def _weights(names: list[str]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(to_stored_tensor(name, torch.randn(_SIDE, _SIDE, generator=generator).half()) for name in names)


def _sums(names: list[str]) -> tuple[Any, ...]:
    """Sums of which each matrix stores its own unweighted Hessian."""
    parts = {"weighted": torch.eye(_SIDE), "plain": torch.eye(_SIDE), "rows": torch.ones(_SIDE)}
    return tuple(
        to_stored_tensor(f"{name.removesuffix('.weight')}.{part}", tensor)
        for name in names
        for part, tensor in parts.items()
    )


def _hessians(store: Store, names: list[str]) -> Hessians:
    rows = (HessianRow(name, 1, name, "0" * 64) for name in names)
    return Hessians(store, 0.5, {row.name: StoredHessian("hessians.safetensors", row) for row in rows})


def _layer(store: Store, names: list[str]) -> LayerTask:
    infos = {info.name: info for info in read_header(store, "source.safetensors")[1]}
    items = tuple((whole_matrix(infos[name]), (_SPEC,)) for name in names)
    return LayerTask("model.layers.0", "model-00001-of-00001.safetensors", items)

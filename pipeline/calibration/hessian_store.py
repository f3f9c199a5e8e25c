"""The cache of Hessians: one directory for each model and text, with one safetensors file per matrix.

The file of matrix X, of shape [m, n], holds float32 sums over tokens: X.weighted [n, n], X.rows [m] and, unless another
matrix with the same input stores it, X.plain [n, n]. `gather.py` defines them. The directory is opened like an output
(outputs/transaction.py), but it is never marked as finished, because later runs may add matrices.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import RUN, read_header
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.tensor_io import FINISHED_FOLDER, finished_sha256, read_tensor
from pipeline.errors import StoreError
from pipeline.storage.records import (
    CalibrationRunRecord,
    CalibrationSourceRecord,
    FinishedFileRecord,
    read_cached,
    read_record,
)
from pipeline.storage.store import Store
from swsc_core import Metric
from swsc_core.compressed.config_json import part_name

# File of the directory that holds digests of what the sums were gathered from, by range of a file.
SOURCE = "source.json"


@dataclass(frozen=True)
class HessianRow:
    """Record of the sums of one matrix.

    Attributes:
        tokens: tokens of the text that reached the matrix.
        owner: matrix that stores the unweighted Hessian (`plain`) for all matrices with the same input; None in a
            damaged record.
    """

    name: str
    tokens: int
    owner: str | None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "HessianRow":
        """Inverse of `dataclasses.asdict`; other keys are ignored."""
        return cls(row["name"], row["tokens"], row["owner"])


def source_of(store: Store) -> RangeDigests:
    """Digests of the byte ranges that the Hessians in `store` were gathered from.

    Empty if there are no Hessians, or if an earlier release wrote them.
    """
    if not store.exists(SOURCE):
        return {}
    digests: RangeDigests = read_cached(
        store, SOURCE, lambda: read_record(store, SOURCE, CalibrationSourceRecord)["ranges"]
    )
    return digests


def require_same_source(store: Store, gathered_from: RangeDigests, digests: RangeDigests) -> None:
    """Raise StoreError if `digests` of a model differ from what the Hessians in `store` were gathered from."""
    common = gathered_from.keys() & digests.keys()
    if differing := sorted(byte_range for byte_range in common if gathered_from[byte_range] != digests[byte_range]):
        raise StoreError(
            f"{differing[0]}: other bytes than the Hessians in {store.root} were gathered from: the file was changed,"
            " or a disk, the network or memory corrupts it; remove that directory and run the same command again, or"
            " name the right bytes with --verify-source"
        )


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """layer -> names of its matrices, in the order of `names`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers


def hessian_file(name: str) -> str:
    """File of the sums of the matrix `name`."""
    return f"{name}.safetensors"


@dataclass(frozen=True)
class Hessians:
    """Hessians in a cache, and how the two kinds are mixed. Picklable, so that workers on other nodes can read them.

    Attributes:
        gradient_share: share of the gradient-weighted Hessian in the mixture, see `blend`.
    """

    store: Store
    gradient_share: float

    def metric(self, name: str, device: str) -> tuple[Metric, float]:
        """The metric of a matrix, and the loss, in nats per token of the text, of one unit of its weighted error.

        An expert that received no token gets the unweighted metric, and its errors cost nothing.
        """
        row = self._row(name)
        if row.tokens == 0:
            return Metric(), 0.0
        weighted, rows = (self._read(name, part).to(device) for part in ("weighted", "rows"))
        plain = self._read(row.owner or name, "plain").to(device)
        hessian = blend(plain, weighted, self.gradient_share)
        gradients = float(rows.sum())
        trace = float(weighted.trace()) / gradients if gradients > 0 else 0.0
        # `Metric` scales the Hessian and the row weights to a mean of one, which this factor reverses.
        unit = 0.5 * trace / len(hessian) * gradients / self._text_tokens() / len(rows)
        return Metric(hessian, rows if gradients > 0 else None, tokens=row.tokens, name=name), unit

    def tokens(self, name: str) -> int:
        """Number of tokens of the text that reached a matrix."""
        return self._row(name).tokens

    def sha256(self, name: str) -> str:
        """Digest of the files that `metric` reads: the file of the matrix, and the file with its unweighted Hessian."""
        files = dict.fromkeys((hessian_file(name), hessian_file(self._row(name).owner or name)))
        return hashlib.sha256(" ".join(finished_sha256(self.store, file) for file in files).encode()).hexdigest()

    def _text_tokens(self) -> int:
        """Number of tokens of the text; an expert receives only some of them."""
        windows, length = read_cached(self.store, RUN, lambda: read_record(self.store, RUN, CalibrationRunRecord))[
            "windows"
        ]
        return int(windows * length)

    def _row(self, name: str) -> HessianRow:
        file = f"{FINISHED_FOLDER}/{hessian_file(name)}.json"
        return read_cached(
            self.store, file, lambda: HessianRow.from_json(read_record(self.store, file, FinishedFileRecord)["rows"][0])
        )

    def _read(self, name: str, part: str) -> Tensor:
        infos = {info.name: info for info in read_header(self.store, hessian_file(name))[1]}
        return read_tensor(self.store, infos[part_name(name, part)])


def blend(plain: Tensor, weighted: Tensor, gradient_share: float) -> Tensor:
    """(1 − s) plain / tr(plain) + s weighted / tr(weighted) with s = `gradient_share`, [n, n]. Overwrites `plain`.

    The weighted Hessian is right in theory but noisy in practice, because few tokens carry most of the gradient. The
    unweighted one is smooth but ignores which tokens matter. docs/method.md describes the experiment.
    """
    traces = float(plain.trace()), float(weighted.trace())
    if traces[1] <= 0:  # all gradients are zero: the loss does not depend on this matrix
        return plain
    return plain.mul_((1 - gradient_share) / traces[0]).add_(weighted, alpha=gradient_share / traces[1])

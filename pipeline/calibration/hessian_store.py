"""The cache of Hessians: one directory for each model and text, with one safetensors file per layer.

For matrix X, of shape [m, n], a file holds float32 sums over tokens: X.weighted [n, n], X.rows [m] and, unless another
matrix with the same input stores it, X.plain [n, n]. `gather.py` defines them. A layer whose sums are large has several
files. The directory is opened like an output (outputs/transaction.py), but it is never marked as finished, because
later runs may add matrices: they write further files of the same layers. Earlier releases wrote a file per matrix,
which is read as well.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from pipeline.architectures.tensor_info import TensorInfo
from pipeline.architectures.tensor_names import layer_of
from pipeline.checkpoints.checkpoint import RUN, read_header
from pipeline.checkpoints.integrity.digests import RangeDigests
from pipeline.checkpoints.matrix_info import MatrixInfo
from pipeline.checkpoints.tensor_io import read_tensor
from pipeline.errors import StoreError
from pipeline.outputs.existing_output import FinishedFiles
from pipeline.planning.tasks import bounded_groups
from pipeline.storage.records import CalibrationRunRecord, CalibrationSourceRecord, read_cached, read_record
from pipeline.storage.store import Store
from swsc_core import Metric
from swsc_core.compressed.config_json import part_name

# Bytes of sums in one file, at most, unless those of one matrix are more.
_FILE_BYTES = 2 << 30
# Hexadecimal digits of the digest of the matrices in the name of a file.
_NAME_DIGITS = 12
# File of the directory that holds digests of what the sums were gathered from, by range of a file.
SOURCE = "source.json"


@dataclass(frozen=True)
class HessianRow:
    """Record of the sums of one matrix.

    Attributes:
        tokens: tokens of the text that reached the matrix.
        owner: matrix that stores the unweighted Hessian (`plain`) for all matrices with the same input; None in a
            damaged record.
        sha256: digest of a file that would hold this matrix alone; None until the sums are complete.
    """

    name: str
    tokens: int
    owner: str | None
    sha256: str | None = None

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "HessianRow":
        """Inverse of `dataclasses.asdict`; other keys are ignored."""
        return cls(row["name"], row["tokens"], row["owner"], row.get("sha256"))


@dataclass(frozen=True)
class StoredHessian:
    """The record of a matrix, and the file that holds its sums."""

    file: str
    row: HessianRow

    @property
    def is_owner(self) -> bool:
        """Whether the file holds the unweighted Hessian of the matrix."""
        return self.row.owner == self.row.name


@dataclass(frozen=True)
class HessianPart:
    """Matrices of one layer whose sums are one payload, and one file."""

    layer: str
    names: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of the file. Parts of other matrices have other names."""
        digest = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return f"{self.layer}-{digest[:_NAME_DIGITS]}.safetensors"


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


def layer_parts(infos: Iterable[MatrixInfo]) -> list[list[HessianPart]]:
    """The parts of each layer, in the order of `infos`."""
    layers: dict[str, list[MatrixInfo]] = {}
    for info in infos:
        layers.setdefault(layer_of(info.name), []).append(info)
    return [
        [HessianPart(layer, tuple(info.name for info in group)) for group in _groups(matrices)]
        for layer, matrices in layers.items()
    ]


def _groups(matrices: Sequence[MatrixInfo]) -> Iterable[list[MatrixInfo]]:
    """Matrices of a layer by files, as if each stored an unweighted Hessian."""
    return bounded_groups(matrices, lambda info: 8 * info.shape[1] ** 2, _FILE_BYTES)


def stored_in(finished: FinishedFiles) -> list[StoredHessian]:
    """The matrices in the finished files of a cache."""
    found = []
    for file, (record, rows) in finished.items():
        for row in map(HessianRow.from_json, rows):
            # A file of an earlier release holds one matrix.
            found.append(StoredHessian(file, replace(row, sha256=row.sha256 or record.sha256)))
    return found


def complete(found: Iterable[StoredHessian]) -> dict[str, StoredHessian]:
    """Those whose unweighted Hessian is stored, by name.

    An interrupted run may have left a matrix without the one that owns its unweighted Hessian, and the present run may
    not need the other matrix.
    """
    owners_last = sorted(found, key=lambda each: each.is_owner)
    owners = {each.row.name for each in owners_last if each.is_owner}
    return {each.row.name: each for each in owners_last if each.row.owner in owners}


@dataclass(frozen=True)
class Hessians:
    """Hessians in a cache, and how the two kinds are mixed. Picklable, so that workers on other nodes can read them.

    Attributes:
        gradient_share: share of the gradient-weighted Hessian in the mixture, see `blend`.
        stored: matrix -> its record and file.
    """

    store: Store
    gradient_share: float
    stored: Mapping[str, StoredHessian] = field(default_factory=dict, compare=False, repr=False)

    def of(self, names: Iterable[str]) -> "Hessians":
        """The Hessians of some matrices, so that a task carries the records of its own matrices only."""
        own = {name: self.stored[name] for name in names}
        owners = {each.row.owner: self.stored[each.row.owner] for each in own.values() if each.row.owner}
        return replace(self, stored=owners | own)

    def metric(self, name: str, device: str) -> tuple[Metric, float]:
        """The metric of a matrix, and the loss, in nats per token of the text, of one unit of its weighted error.

        An expert that received no token gets the unweighted metric, and its errors cost nothing.
        """
        row = self.stored[name].row
        if row.tokens == 0:
            return Metric(), 0.0
        weighted, rows = (self._read(name, part).to(device) for part in ("weighted", "rows"))
        plain = self._read(row.owner or name, "plain").to(device)
        hessian = blend(plain, weighted, self.gradient_share)
        gradients = float(rows.sum())
        trace = float(weighted.trace()) / gradients if gradients > 0 else 0.0
        # `Metric` scales the Hessian and the row weights to a mean of one, which this factor reverses.
        unit = 0.5 * trace / len(hessian) * gradients / self._text_tokens / len(rows)
        return Metric(hessian, rows if gradients > 0 else None, tokens=row.tokens, name=name), unit

    def tokens(self, name: str) -> int:
        """Number of tokens of the text that reached a matrix."""
        return self.stored[name].row.tokens

    def sha256(self, name: str) -> str:
        """Digest of what `metric` reads: the sums of the matrix, and those with its unweighted Hessian."""
        rows = [self.stored[each].row for each in (name, self.stored[name].row.owner or name)]
        digests = dict.fromkeys(str(row.sha256) for row in rows)
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @cached_property
    def _text_tokens(self) -> int:
        """Number of tokens of the text; an expert receives only some of them."""
        windows, length = read_cached(self.store, RUN, lambda: read_record(self.store, RUN, CalibrationRunRecord))[
            "windows"
        ]
        return int(windows * length)

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        """File -> its tensors by name, of the files that were read."""
        return {}

    def _read(self, name: str, part: str) -> Tensor:
        file = self.stored[name].file
        if file not in self._headers:
            self._headers[file] = {info.name: info for info in read_header(self.store, file)[1]}
        return read_tensor(self.store, self._headers[file][part_name(name, part)])


def blend(plain: Tensor, weighted: Tensor, gradient_share: float) -> Tensor:
    """(1 − s) plain / tr(plain) + s weighted / tr(weighted) with s = `gradient_share`, [n, n]. Overwrites `plain`.

    The weighted Hessian is right in theory but noisy in practice, because few tokens carry most of the gradient. The
    unweighted one is smooth but ignores which tokens matter. docs/method.md describes the experiment.
    """
    traces = float(plain.trace()), float(weighted.trace())
    if traces[1] <= 0:  # all gradients are zero: the loss does not depend on this matrix
        return plain
    return plain.mul_((1 - gradient_share) / traces[0]).add_(weighted, alpha=gradient_share / traces[1])

"""Where second moments lie: a directory for a model and a text, in it a safetensors file for each matrix.

Of a matrix X.weight [m, n] it holds X.weighted, float32 [n, n], X.rows, float32 [m], and, unless another matrix of the same
input has it, X.plain, float32 [n, n]; measure/calibration.py says what they are. The directory is begun as an output is
(output.py) and never finished: another run may add more matrices.
"""

import hashlib
from collections.abc import Iterable
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

SOURCE = "source.json"  # beside them: digests of what they were gathered from, by range of a file


def source_of(store: Store) -> RangeDigests:
    """Digests of what the moments in `store` were gathered from; none, if nothing was or an earlier release did."""
    if not store.exists(SOURCE):
        return {}
    found: RangeDigests = read_cached(
        store, SOURCE, lambda: read_record(store, SOURCE, CalibrationSourceRecord)["ranges"]
    )
    return found


def require_same_source(store: Store, before: RangeDigests, read: RangeDigests) -> None:
    """Raise StoreError if what is read of a model is not what the moments in `store` were gathered from, `before`."""
    if differing := sorted(where for where in before.keys() & read.keys() if before[where] != read[where]):
        raise StoreError(
            f"{differing[0]} is read as other bytes than when the moments in {store.root} were gathered: the file was changed, or"
            " its disk, the network or a memory corrupts what it holds; remove that directory and run the same command again, or"
            " name the right bytes by --verify-source"
        )


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """layer -> its matrices, in the order of the names."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers


def hessian_file(name: str) -> str:
    """File of the sums of one matrix."""
    return f"{name}.safetensors"


@dataclass(frozen=True)
class Hessians:
    """Sums of a calibration and how they are blended; a value, so that workers on other nodes can hold it too."""

    store: Store
    gradient_share: float

    def metric(self, name: str, device: str) -> tuple[Metric, float]:
        """The metric of one matrix, and the loss (nats a token of the text) that one unit of its energy stands for.

        An expert that no token of the text was sent to has the plain metric, and its errors cost nothing.
        """
        row = self._row(name)
        if row["tokens"] == 0:
            return Metric(), 0.0
        weighted, rows = (self._read(name, part).to(device) for part in ("weighted", "rows"))
        plain = self._read(row["owner"], "plain").to(device)
        moment = blend(plain, weighted, self.gradient_share)
        gradients = float(rows.sum())
        trace = float(weighted.trace()) / gradients if gradients > 0 else 0.0
        unit = 0.5 * trace / len(moment) * gradients / self._text_tokens() / len(rows)
        return Metric(moment, rows if gradients > 0 else None, tokens=row["tokens"], name=name), unit

    def tokens(self, name: str) -> int:
        """Number of tokens of the text that reached a matrix."""
        return int(self._row(name)["tokens"])

    def sha256(self, name: str) -> str:
        """Stands for what `metric` is made of: the file of a matrix, and the one that has its `plain`."""
        files = dict.fromkeys((hessian_file(name), hessian_file(self._row(name)["owner"] or name)))
        return hashlib.sha256(" ".join(finished_sha256(self.store, file) for file in files).encode()).hexdigest()

    def _text_tokens(self) -> int:
        """Number of tokens of the text; an expert sees some of them."""
        windows, length = read_cached(self.store, RUN, lambda: read_record(self.store, RUN, CalibrationRunRecord))[
            "windows"
        ]
        return int(windows * length)

    def _row(self, name: str) -> dict[str, Any]:
        file = f"{FINISHED_FOLDER}/{hessian_file(name)}.json"
        row: dict[str, Any] = read_cached(
            self.store, file, lambda: read_record(self.store, file, FinishedFileRecord)["rows"][0]
        )
        return row

    def _read(self, name: str, part: str) -> Tensor:
        infos = {info.name: info for info in read_header(self.store, hessian_file(name))[1]}
        return read_tensor(self.store, infos[part_name(name, part)])


def blend(plain: Tensor, weighted: Tensor, gradient_share: float) -> Tensor:
    """Both moments [n, n] at equal trace, `gradient_share` of the weighted one; made in the place of `plain`.

    The weighted moment is the right one in theory and noisy in practice, because few tokens carry most of the gradient;
    the plain one is smooth and blind to what matters. docs/method.md has the experiment.
    """
    traces = float(plain.trace()), float(weighted.trace())
    if traces[1] <= 0:  # no gradient ever came: the loss does not depend on this matrix
        return plain
    return plain.mul_((1 - gradient_share) / traces[0]).add_(weighted, alpha=gradient_share / traces[1])

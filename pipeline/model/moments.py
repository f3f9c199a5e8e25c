"""Where second moments lie: a directory for a model and a text, in it a safetensors file for each matrix.

Of a matrix X.weight [m, n] it holds X.moment, float32 [n, n], and X.rows, float32 [m]; measure/calibration.py says what they
are. The directory is begun as an output is (artifact.py) and never finished: another run may add more matrices.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.model.artifact import part_name
from pipeline.model.checkpoint import read_header
from pipeline.model.families import layer_of
from pipeline.model.parts import read_tensor
from pipeline.model.store import Store
from swsc_core import Metric


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """layer -> its matrices, in the order of the names."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers


def moment_file(name: str) -> str:
    """File of the moments of one matrix."""
    return f"{name}.safetensors"


@dataclass(frozen=True)
class Moments:
    """A calibration; a value, so that workers on other nodes can hold it too."""

    store: Store

    def metric(self, name: str, device: str) -> tuple[Metric, float]:
        """The metric of one matrix, and the loss (nats a token) that one unit of its energy stands for."""
        infos = {info.name: info for info in read_header(self.store, moment_file(name))[1]}
        moment, rows = (read_tensor(self.store, infos[part_name(name, part)]).to(device) for part in ("moment", "rows"))
        unit = 0.5 * float(moment.diagonal().double().mean()) * float(rows.double().mean())
        return Metric(moment, rows, name=name), unit

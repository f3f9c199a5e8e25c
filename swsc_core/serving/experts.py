"""Experts of a mixture: engines multiply them by kernels that take dense weights alone, so W of each is restored as it loads.

What is restored goes to the engine's own loader, which cuts a rank's slice; parts are held no longer than their matrix is incomplete.
"""

from collections.abc import Mapping

from torch import Tensor

from swsc_core.compressed.codec import decode
from swsc_core.compressed.entry import Entry
from swsc_core.serving.weight_loader import REMEDY, require_whole

Expert = tuple[int, str]  # its number, and the engine's name of the matrix ("w1", "w2", "w3")


class RestoredExperts:
    """The compressed matrices of the experts of a layer, by what the checkpoint calls them, and their entries."""

    def __init__(self, matrices: Mapping[Expert, tuple[str, Entry]]) -> None:
        self.matrices = dict(matrices)
        self._arrived: dict[Expert, dict[str, Tensor]] = {expert: {} for expert in matrices}

    def parts(self, *kinds: str) -> set[str]:
        """Names of the parts of the matrices that an engine calls by one of `kinds`."""
        return {
            part for (_, kind), (_, entry) in self.matrices.items() if kind in kinds for part in entry.part_shapes()
        }

    def take(self, expert: Expert, part: str, tensor: Tensor) -> Tensor | None:
        """W [m, n], in the dtype that it had, once the last part of it has come; a dense weight as it is.

        Raises:
            ValueError: a part that does not belong there, or parts that are damaged.
        """
        name, entry = self.matrices.get(expert, ("", None))
        if entry is None and part == "weight":
            return tensor
        if entry is None or part not in entry.part_shapes():
            raise ValueError(
                f"{name or f'expert {expert[0]}, {expert[1]}'}.{part}: config.json knows no such part; {REMEDY}"
            )
        arrived = self._arrived[expert]
        arrived[part] = tensor.clone()  # the engine may use its buffer again
        if arrived.keys() != entry.part_shapes().keys():
            return None
        require_whole(name, arrived, entry)
        restored = decode(arrived, entry)
        del self._arrived[expert]
        return restored

    def require_all(self) -> None:
        """Raise ValueError, naming what has not come, unless every matrix has been restored."""
        for expert, arrived in self._arrived.items():
            name, entry = self.matrices[expert]
            missing = ", ".join(f"{name}.{part}" for part in entry.part_shapes() if part not in arrived)
            raise ValueError(f"not in the checkpoint: {missing}; {REMEDY}")

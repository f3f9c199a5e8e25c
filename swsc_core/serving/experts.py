"""Restoring of a mixture's experts while an engine loads them: the engines' expert kernels take dense weights only.

A restored matrix is passed to the engine's own loader, which cuts the rank's slice. Parts are kept until their matrix
is complete.
"""

from collections.abc import Mapping

from torch import Tensor

from swsc_core.compressed.codec import decode
from swsc_core.compressed.entry import Entry
from swsc_core.serving.weight_loader import REMEDY, require_complete

# number of the expert, and the engine's name of the matrix ("w1", "w2", "w3")
Expert = tuple[int, str]


class RestoredExperts:
    """Collects the stored parts of a layer's experts and restores each matrix when its last part arrives.

    Args:
        matrices: expert -> name in the checkpoint and entry, for each compressed matrix.
    """

    def __init__(self, matrices: Mapping[Expert, tuple[str, Entry]]) -> None:
        self.matrices = dict(matrices)
        self._arrived: dict[Expert, dict[str, Tensor]] = {expert: {} for expert in matrices}

    def parts(self, *kinds: str) -> set[str]:
        """Names of the stored parts of all matrices of these kinds ("w1", …)."""
        return {
            part for (_, kind), (_, entry) in self.matrices.items() if kind in kinds for part in entry.part_shapes()
        }

    def take(self, expert: Expert, part: str, tensor: Tensor) -> Tensor | None:
        """Add a stored tensor of an expert.

        Returns:
            The restored matrix [m, n], in the dtype of its entry, if this was its last part. A dense weight is returned
            unchanged. Otherwise None.

        Raises:
            ValueError: config.json names no such part, or the parts are damaged.
        """
        name, entry = self.matrices.get(expert, ("", None))
        if entry is None and part == "weight":
            return tensor
        if entry is None or part not in entry.part_shapes():
            name = name or f"expert {expert[0]}, {expert[1]}"
            raise ValueError(f"{name}.{part}: config.json names no such part; {REMEDY}")
        parts = self._arrived[expert]
        # a copy, because the engine may reuse its buffer
        parts[part] = tensor.clone()
        if parts.keys() != entry.part_shapes().keys():
            return None
        require_complete(name, parts, entry)
        restored = decode(parts, entry)
        del self._arrived[expert]
        return restored

    def require_all(self) -> None:
        """Raise ValueError, naming the missing parts, unless every matrix has been restored."""
        for expert, parts in self._arrived.items():
            name, entry = self.matrices[expert]
            missing = ", ".join(f"{name}.{part}" for part in entry.part_shapes() if part not in parts)
            raise ValueError(f"not in the checkpoint: {missing}; {REMEDY}")

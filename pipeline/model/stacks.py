"""Experts that lie stacked in the file: one tensor [experts, …] for gate and up of all of them, one for down.

Families differ in the way an expert's matrix lies (outputs × inputs, or turned round for `bmm`), and in how gate and up are
joined in it. Both are held against config.json: a stack is cut into matrices only where its shape is the one that it says.
"""

from dataclasses import dataclass

from pipeline.model.geometry import Geometry, halves
from pipeline.model.model_config import Config, number_of
from pipeline.model.tensors import FLOATS, TensorInfo


@dataclass(frozen=True)
class Stack:
    """A tensor that holds one matrix of every expert.

    Attributes:
        name: of the tensor, without `.weight`, whether it has that or not.
        roles: what a matrix joins; nothing, if it is down alone.
        turned: whether a matrix lies as [inputs, outputs]; None: one way or the other, whichever fits the config.
        geometry: how gate and up lie in a matrix.
        width: what the config calls the number of an expert's inner values.
    """

    name: str
    roles: tuple[str, ...]
    turned: bool | None
    geometry: Geometry
    width: str

    def lies_turned(self, shape: tuple[int, ...], config: Config) -> bool:
        """Whether the matrices of a tensor of this shape lie turned round.

        Raises:
            ValueError: the config does not give the sizes of experts, or gives others.
        """
        count, width, hidden = (number_of(config, key) for key in ("num_local_experts", self.width, "hidden_size"))
        m, n = (len(self.roles) * width, hidden) if self.roles else (hidden, width)
        ways = {turned: (count, *((n, m) if turned else (m, n))) for turned in (False, True)}
        wanted = {turned: way for turned, way in ways.items() if self.turned in (None, turned)}
        found = [turned for turned, way in wanted.items() if way == shape]
        if not found:
            raise ValueError(f"by config.json that is {' or '.join(str(list(way)) for way in wanted.values())}")
        return found[0]


def stacks(
    gate_up: str, down: str, turned: bool | None = False, geometry: Geometry = halves, width: str = "intermediate_size"
) -> tuple[Stack, Stack]:
    """The two stacks of a family, by their names."""
    return Stack(gate_up, ("gate", "up"), turned, geometry, width), Stack(down, (), turned, geometry, width)


def is_stack(info: TensorInfo) -> bool:
    """Whether a tensor is a stack of matrices, each of which can be compressed: kernels of convolutions are none."""
    kernel = "conv" in info.name or info.name.endswith("bias")
    return len(info.shape) == 3 and min(info.shape) > 1 and info.dtype in FLOATS and not kernel

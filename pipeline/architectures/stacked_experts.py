"""Experts that are stacked in the file: one tensor [experts, …] for gate and up of all of them, one for down.

Families store an expert's matrix as [outputs, inputs], or transposed for `bmm`, and differ in how they fuse gate and up in it. Both
are compared with config.json: a stack is cut into matrices only where it has the shape that the config gives.
"""

from dataclasses import dataclass

from pipeline.architectures.fused_layouts import FusedLayout, halves
from pipeline.architectures.model_config import ModelConfig, number_of
from pipeline.architectures.tensor_info import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True)
class StackedExperts:
    """A tensor that stacks one matrix of every expert, [experts, …].

    Attributes:
        name: of the tensor, without `.weight`, whether it has that or not.
        roles: what a matrix fuses; empty for down alone.
        transposed: whether a matrix is stored as [inputs, outputs]; None: whichever of both fits the config.
        layout: of the rows of gate and up in a matrix.
        width: what the config calls the number of an expert's inner values.
    """

    name: str
    roles: tuple[str, ...]
    transposed: bool | None
    layout: FusedLayout
    width: str

    def is_transposed(self, shape: tuple[int, ...], config: ModelConfig) -> bool:
        """Whether the matrices of a tensor of this shape are stored as [inputs, outputs].

        Raises:
            ValueError: the config does not give the sizes of experts, or gives others.
        """
        count, width, hidden = (number_of(config, key) for key in ("num_local_experts", self.width, "hidden_size"))
        m, n = (len(self.roles) * width, hidden) if self.roles else (hidden, width)
        shapes = {False: (count, m, n), True: (count, n, m)}
        expected = {transposed: one for transposed, one in shapes.items() if self.transposed in (None, transposed)}
        fitting = [transposed for transposed, one in expected.items() if one == shape]
        if not fitting:
            raise ValueError(f"by config.json that is {' or '.join(str(list(one)) for one in expected.values())}")
        return fitting[0]


def stacks(
    gate_up: str, down: str, transposed: bool | None = False, layout: FusedLayout = halves,
    width: str = "intermediate_size",
) -> tuple[StackedExperts, StackedExperts]:  # fmt: skip
    """The two stacks of a family, by their names."""
    wide = StackedExperts(gate_up, ("gate", "up"), transposed, layout, width)
    return wide, StackedExperts(down, (), transposed, layout, width)


def is_stack(info: TensorInfo) -> bool:
    """Whether a tensor is a stack of matrices, each of which can be compressed: kernels of convolutions are none."""
    kernel = "conv" in info.name or info.name.endswith("bias")
    return len(info.shape) == 3 and min(info.shape) > 1 and info.dtype in FLOAT_DTYPES and not kernel

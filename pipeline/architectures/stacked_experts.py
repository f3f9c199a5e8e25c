"""Stacked experts: one tensor [experts, …] with gate and up of all experts, and one with down.

Families store an expert's matrix as [outputs, inputs], or transposed for `bmm`, and fuse gate and up in different ways.
A tensor is split into matrices only if its shape matches config.json.
"""

from dataclasses import dataclass

from pipeline.architectures.fused_layouts import FusedLayout, halves
from pipeline.architectures.model_config import ModelConfig, number_of
from pipeline.architectures.tensor_info import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True)
class StackedExperts:
    """A tensor that stacks one matrix of every expert, [experts, …].

    Attributes:
        name: name of the tensor, without the ending `.weight`, which is optional.
        roles: roles that a matrix fuses; empty for down.
        transposed: whether a matrix is stored as [inputs, outputs]. None: the orientation that matches the config.
        layout: row layout of gate and up in a matrix.
        width: key of the config for the intermediate size of an expert.
    """

    name: str
    roles: tuple[str, ...]
    transposed: bool | None
    layout: FusedLayout
    width: str

    def is_transposed(self, shape: tuple[int, ...], config: ModelConfig) -> bool:
        """Whether the matrices of a tensor of this shape are stored as [inputs, outputs].

        Raises:
            ValueError: the config lacks the sizes of experts, or they do not match the shape.
        """
        count, width, hidden = (number_of(config, key) for key in ("num_local_experts", self.width, "hidden_size"))
        m, n = (len(self.roles) * width, hidden) if self.roles else (hidden, width)
        shapes = {False: (count, m, n), True: (count, n, m)}
        expected = {key: value for key, value in shapes.items() if self.transposed in (None, key)}
        matching = [transposed for transposed, expected_shape in expected.items() if expected_shape == shape]
        if not matching:
            raise ValueError(f"by config.json it is {' or '.join(str(list(value)) for value in expected.values())}")
        return matching[0]


def stacks(
    gate_up: str,
    down: str,
    transposed: bool | None = False,
    layout: FusedLayout = halves,
    width: str = "intermediate_size",
) -> tuple[StackedExperts, StackedExperts]:
    """Return the two stacks of a family: gate and up, and down."""
    first = StackedExperts(gate_up, ("gate", "up"), transposed, layout, width)
    return first, StackedExperts(down, (), transposed, layout, width)


def is_stack(info: TensorInfo) -> bool:
    """Whether a tensor stacks matrices that can be compressed. Kernels of convolutions and biases are excluded."""
    kernel = "conv" in info.name or info.name.endswith("bias")
    return len(info.shape) == 3 and min(info.shape) > 1 and info.dtype in FLOAT_DTYPES and not kernel

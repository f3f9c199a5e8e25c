"""Experts of a mixture as separate matrices, so that some of them can be compressed and others not.

transformers fuses the experts of a layer to one parameter [experts, rows, columns]. Here each expert has matrices of
its own, as in the file, and the output is computed expert by expert with the gate of the fused module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "leave it out, or open the model with SwscConfig(dequantize=True)"


def eager_error(implementation: str) -> str:
    """Error message for an experts implementation that cannot use compressed experts."""
    return (
        f"experts_implementation {implementation!r} needs the experts of a layer in one dense tensor, but they stay"
        f' compressed and are computed one by one ("eager"); {REMEDY}'
    )


class SwscExperts(nn.Module):
    """Experts with separate matrices: Σ weight · down(gate(up(x))) over the experts that a token is routed to.

    Args:
        fused: the module that this one replaces. It supplies the gate and the shapes of the experts; its own parameters
            are not read and may be on the meta device.
        up: name of the parameter [experts, m, n] of `fused` that concatenates the rows of all matrices in `leaves` but
            the last.
        down: name of the parameter [experts, n, m'] of `fused` that holds the last matrix in `leaves`.
        leaves: names of the matrices of an expert, in the order of their rows in `fused`.
    """

    def __init__(self, fused: Any, up: str, down: str, leaves: Sequence[str]) -> None:
        super().__init__()
        # In a tuple the fused module is no submodule: it is not loaded, moved or saved.
        self._fused = (fused,)
        self.up, self.down, self.leaves = up, down, tuple(leaves)
        wide, narrow = getattr(fused, up), getattr(fused, down)
        rows, on_meta = wide.shape[1] // (len(leaves) - 1), {"device": "meta", "dtype": wide.dtype}
        for number in range(len(wide)):
            expert = {leaf: nn.Linear(wide.shape[2], rows, bias=False, **on_meta) for leaf in leaves[:-1]}
            expert[leaves[-1]] = nn.Linear(narrow.shape[2], narrow.shape[1], bias=False, **on_meta)
            self.add_module(str(number), nn.ModuleDict(expert))

    @property
    def fused(self) -> Any:
        """The module that this one replaces."""
        return self._fused[0]

    def __len__(self) -> int:
        """Number of experts."""
        return len(self._modules)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Output of the experts of each token, [tokens, n] in the dtype of x.

        Args:
            x: [tokens, n].
            chosen: indices of the experts of each token, int64 [tokens, k].
            weights: weights of the experts of each token, [tokens, k].

        Raises:
            ValueError: the model is configured for another implementation of experts, or the router chose an expert
                that is absent.
        """
        if (implementation := self.fused.config._experts_implementation) not in (None, "eager"):
            raise ValueError(eager_error(implementation))
        order = chosen.reshape(-1).argsort(stable=True)
        counts = chosen.reshape(-1).bincount(minlength=len(self)).tolist()
        if len(counts) > len(self):
            raise ValueError(
                f"the router chose expert {len(counts) - 1}, but the layer has {len(self)};"
                " compressed experts cannot be distributed over devices"
            )
        k = chosen.shape[1]
        tokens = (rows // k for rows in torch.split(order, counts))
        outputs = [self._expert(number, x[rows]) for number, rows in enumerate(tokens) if len(rows)]
        y = torch.cat(outputs) * weights.reshape(-1)[order, None] if outputs else x.new_empty(0, x.shape[1])
        # A permutation and a sum, because `index_add_` has no fixed order on CUDA.
        return y[order.argsort()].reshape(len(x), k, x.shape[1]).sum(dim=1).to(x.dtype)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        expert = self._matrices(number)
        y = torch.cat([expert[leaf](x) for leaf in self.leaves[:-1]], dim=-1)
        output: Tensor = expert[self.leaves[-1]](
            self.fused._apply_gate(y) if self.fused.has_gate else self.fused.act_fn(y)
        )
        return output

    def _matrices(self, number: int) -> Any:
        return self._modules[str(number)]

    def to_fused(self, dtype: torch.dtype) -> Any:
        """The fused module with the weights of this one, whose matrices must be dense."""
        fused, experts = self.fused, [self._matrices(number) for number in range(len(self))]
        wide = [torch.cat([expert[leaf].weight for leaf in self.leaves[:-1]]) for expert in experts]
        narrow = [expert[self.leaves[-1]].weight for expert in experts]
        for name, weights in ((self.up, wide), (self.down, narrow)):
            setattr(fused, name, nn.Parameter(torch.stack(weights).detach().to(dtype)))
        return fused

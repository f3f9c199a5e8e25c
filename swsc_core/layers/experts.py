"""Experts of a mixture, each with matrices of its own, so that those of one expert can be compressed and those of another not.

transformers joins them to one parameter [experts, rows, columns] for all of a layer. Here they lie as in the file, and what a
token needs is calculated expert by expert, by the parameters' own gate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "leave it out, or open the model with SwscConfig(dequantize=True)"


def eager_error(implementation: str) -> str:
    """Why experts that lie apart cannot be calculated so."""
    return (
        f"experts_implementation {implementation!r} wants the experts of a layer in one dense tensor, these stay compressed"
        f' and are calculated one by one ("eager"); {REMEDY}'
    )


class SwscExperts(nn.Module):
    """What `joined` does, expert by expert: Σ weight · down(gate(up(x))) over the experts that a token was sent to.

    Args:
        joined: the module in whose place this one stands: it holds the gate, and the shapes of what it joins. Its own
            parameters are not read, they may lie on the meta device.
        up: name in `joined` of the parameter [experts, m, n] that joins the matrices of `leaves` but the last, row by row.
        down: that of the parameter [experts, n, m'] of the last.
        leaves: names of an expert's matrices, in the order in which they are joined.
    """

    def __init__(self, joined: Any, up: str, down: str, leaves: Sequence[str]) -> None:
        super().__init__()
        self._joined = (joined,)  # no part of this module: nothing of it is loaded, moved or saved
        self.up, self.down, self.leaves = up, down, tuple(leaves)
        wide, narrow = getattr(joined, up), getattr(joined, down)
        rows, place = wide.shape[1] // (len(leaves) - 1), {"device": "meta", "dtype": wide.dtype}
        for number in range(len(wide)):
            expert = {leaf: nn.Linear(wide.shape[2], rows, bias=False, **place) for leaf in leaves[:-1]}
            expert[leaves[-1]] = nn.Linear(narrow.shape[2], narrow.shape[1], bias=False, **place)
            self.add_module(str(number), nn.ModuleDict(expert))

    @property
    def joined(self) -> Any:
        """The module in whose place this one stands."""
        return self._joined[0]

    def __len__(self) -> int:
        """Number of experts."""
        return len(self._modules)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, n], chosen int64 and weights [tokens, k] -> [tokens, n], in the dtype of x.

        Raises:
            ValueError: the model was asked to calculate its experts in another way, or a router asks for one that is not there.
        """
        if (asked := self.joined.config._experts_implementation) not in (None, "eager"):
            raise ValueError(eager_error(asked))
        order = chosen.reshape(-1).argsort(stable=True)
        sent = chosen.reshape(-1).bincount(minlength=len(self)).tolist()
        if len(sent) > len(self):
            raise ValueError(f"expert {len(sent) - 1} is asked for, there are {len(self)}: experts cannot be spread")
        k = chosen.shape[1]
        found = [self._expert(n, x[rows // k]) for n, rows in enumerate(order.split(sent)) if len(rows)]
        y = torch.cat(found) * weights.reshape(-1)[order, None] if found else x.new_empty(0, x.shape[1])
        # back by a permutation and a sum, not by `index_add_`, whose order is any on CUDA
        return y[order.argsort()].reshape(len(x), k, x.shape[1]).sum(dim=1).to(x.dtype)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        expert = self._matrices(number)
        y = torch.cat([expert[leaf](x) for leaf in self.leaves[:-1]], dim=-1)
        return expert[self.leaves[-1]](self.joined._apply_gate(y) if self.joined.has_gate else self.joined.act_fn(y))

    def _matrices(self, number: int) -> Any:
        return self._modules[str(number)]

    def to_fused(self, dtype: torch.dtype) -> Any:
        """`joined`, with the weights of this one; of experts whose matrices are dense."""
        joined, experts = self.joined, [self._matrices(number) for number in range(len(self))]
        wide = [torch.cat([expert[leaf].weight for leaf in self.leaves[:-1]]) for expert in experts]
        narrow = [expert[self.leaves[-1]].weight for expert in experts]
        for name, weights in ((self.up, wide), (self.down, narrow)):
            setattr(joined, name, nn.Parameter(torch.stack(weights).detach().to(dtype)))
        return joined

"""What an error of a weight matrix costs: plain squares, or squares of the layer's outputs.

An input x of the layer turns the error E = W − Ŵ into an error E x of its output. Over many inputs its mean square is
tr(D E H Eᵀ) with the second moment H = E[x xᵀ] and, where some outputs matter more than others, a diagonal D. The paper's
form is H = I, D = I: the sum of squared errors of the weights. K-Means, SVD and everything between take their distances
from here, so there is one implementation of each, whatever the metric (docs/method.md).
"""

from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, not_finite

_ROWS = 512  # of an error that are multiplied at a time
_DAMPING = 0.01  # share of the mean diagonal that is added: keeps directions that calibration never saw from being free
_NOISE = 0.3  # of it, for as many tokens as inputs: with few tokens most directions were hardly seen


class Metric:
    """The quadratic form E ↦ tr(D E H Eᵀ) on errors E [m, n].

    Attributes:
        moment: float32 [n, n], H damped and scaled to a mean diagonal of one; None for H = I.
        row_weights: float32 [m], the diagonal of D, of mean one; None for D = I.
    """

    def __init__(
        self,
        hessian: Tensor | None = None,
        row_weights: Tensor | None = None,
        *,
        tokens: int | None = None,
        name: str = "weight",
    ) -> None:
        """`moment` [n, n], a mean over `tokens` inputs (None: the truth), and `row_weights` [m], in any scale.

        A float32 `moment` is taken over and scaled where it lies: two of its kind would be the most of the memory of a matrix
        that is wider than tall.

        Raises:
            InvalidWeightError: values that are not finite, or a moment that is zero: no input ever reached the matrix.
        """
        self.name = name
        self.hessian = None if hessian is None else _damped(hessian, tokens, name)
        self.row_weights = None if row_weights is None else _normalised(row_weights, name)

    def of_rows(self, rows: Tensor) -> "Metric":
        """The metric of a matrix made of some rows of this one's, int64 [any]; what was factorised is kept."""
        part = copy(self)
        part.row_weights = None if self.row_weights is None else self.row_weights[rows]
        return part

    def product(self, error: Tensor) -> Tensor:
        """E H, [rows, n], for some rows of an error."""
        return error if self.hessian is None else error @ self.hessian

    def weighted_error(self, error: Tensor, first: int = 0) -> float:
        """tr(D E H Eᵀ) of an error [any, n] of rows `first` and on, summed in float64."""
        parts = [(self.product(some) * some).sum(dim=1, dtype=torch.float64) for some in error.split(_ROWS)]
        rows = torch.cat(parts)
        weights = self.weights_of(slice(first, first + len(rows)))
        return float((rows if weights is None else rows * weights[:, 0]).sum())

    def weights_of(self, rows: slice) -> Tensor | None:
        """The diagonal of D for some rows, as a column [rows, 1]."""
        return None if self.row_weights is None else self.row_weights[rows, None]

    def whiten_(self, error: Tensor) -> Tensor:
        """D^½ E L, in the place of `error`: its plain sum of squares is the energy that `error` had."""
        for first in range(0, len(error), _ROWS):
            rows = slice(first, first + _ROWS)
            weights = self.weights_of(rows)
            error[rows] = self.whiten_inputs(error[rows] if weights is None else error[rows] * weights.sqrt())
        return error

    def whiten_inputs(self, rows: Tensor) -> Tensor:
        """Rows times L, [any, n]: their plain squared distances are those of the layer's outputs."""
        return rows if self.hessian is None else rows @ self.root

    def unwhiten_left(self, left: Tensor) -> Tensor:
        """D^-½ A for a left factor A [m, r] that was found in whitened space."""
        return left if self.row_weights is None else left / self.row_weights.sqrt()[:, None]

    def unwhiten_right(self, right: Tensor) -> Tensor:
        """B L⁻¹ for a right factor B [r, n] that was found in whitened space."""
        if self.hessian is None:
            return right
        return torch.linalg.solve_triangular(self.root, right, upper=False, left=False)

    @cached_property
    def root(self) -> Tensor:
        """L, lower triangular [n, n], H = L Lᵀ: Cholesky's factor.

        Of all square roots this one also says how columns make up for each other's errors: with E L the whitened error, a
        column of E that comes earlier can cancel what later ones left in its column of E L, and no more than that. So
        columns are worked through from the last to the first.
        """
        assert self.hessian is not None
        return self.factor(self.hessian)

    def factor(self, moment: Tensor) -> Tensor:
        """Cholesky's factor of the moment, or of blocks on its diagonal, [.., n, n]; InvalidWeightError if it is not positive definite."""
        factor, info = torch.linalg.cholesky_ex(moment)
        if bool((info != 0).any()):
            raise InvalidWeightError(
                f"{self.name}: its second moment is not positive definite in float32, its inputs are too much alike: give more"
                " text, or exclude this tensor"
            )
        return factor

    @property
    def column_weights(self) -> Tensor | None:
        """What an error of each column costs once the columns before it have made up for it: diag(L)², [n]."""
        return None if self.hessian is None else self.root.diagonal().square()


def _damped(moment: Tensor, tokens: int | None, name: str) -> Tensor:
    mean = float(moment.diagonal().double().mean())
    if not 0 < mean < float("inf") or not_finite(moment):
        what = (
            "is zero, so all of its inputs were zeros" if mean == 0 else f"has a mean diagonal of {mean}, it overflowed"
        )
        raise InvalidWeightError(f"{name}: its second moment {what}: give more text, or exclude this tensor")
    damped = moment.float().div_(mean)
    damped.diagonal().add_(_DAMPING + (_NOISE * len(moment) / tokens if tokens else 0.0))
    return damped


def _normalised(row_weights: Tensor, name: str) -> Tensor:
    mean = float(row_weights.double().mean())
    if not 0 < mean < float("inf") or not bool((row_weights >= 0).all()):
        raise InvalidWeightError(f"{name}: row weights of mean {mean}; wanted finite ones that are not negative")
    return (row_weights.float() / mean).clamp_(min=1e-3)  # a row that seemed to matter to nobody is still a row

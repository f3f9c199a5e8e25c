"""The cost of an error in a weight matrix: plain squares, or squares of the error of the layer's outputs.

For an input x of the layer, an error E = W − Ŵ of the weight causes an error E x of the output. Over many inputs its
mean square is tr(D E H Eᵀ), the *weighted error*, with the Hessian H = E[x xᵀ] and, if outputs matter unequally, a
diagonal D. The paper's form is H = I, D = I: the sum of squared errors of the weights. K-Means, SVD and everything
between them take their distances from this class, so that there is one implementation of each for any metric
(docs/method.md).
"""

from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, count_nonfinite

# Rows of an error that are multiplied at a time.
_ROWS = 512
# Share of the mean diagonal that is added to H. Without it, errors along directions that no calibration input had would
# cost nothing.
_DAMPING = 0.01
# Share that is added besides, for as many tokens as inputs. It is larger with fewer tokens, which determine fewer
# directions.
_SAMPLING_DAMPING = 0.3
# Least weight of a row, relative to the mean.
_LEAST_ROW_WEIGHT = 1e-3


class Metric:
    """The quadratic form E ↦ tr(D E H Eᵀ) on errors E [m, n].

    Attributes:
        hessian: float32 [n, n], H damped and scaled to a mean diagonal of one; None for H = I.
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
        """
        Args:
            hessian: [n, n], the second moment of the inputs in any unit; None for H = I. A float32 tensor is
                overwritten, because a second one of its size would dominate the memory of a matrix that is wider than
                tall.
            row_weights: [m], not negative, in any unit; None for D = I.
            tokens: number of inputs that `hessian` is a mean over; None if it is exact.
            name: of the tensor, for errors.

        Raises:
            InvalidWeightError: values that are not finite, or a Hessian that is zero because all inputs were.
        """
        self.name = name
        self.hessian = None if hessian is None else _damped(hessian, tokens, name)
        self.row_weights = None if row_weights is None else _normalized(row_weights, name)

    def of_rows(self, rows: Tensor) -> "Metric":
        """The metric of the given rows of the matrix, int64 [count]; it shares the factorization of H."""
        part = copy(self)
        part.row_weights = None if self.row_weights is None else self.row_weights[rows]
        return part

    def product(self, error: Tensor) -> Tensor:
        """E H for some rows of an error, [rows, n]."""
        return error if self.hessian is None else error @ self.hessian

    def weighted_error(self, error: Tensor, first: int = 0) -> float:
        """tr(D E H Eᵀ) of an error [rows, n] of the rows from `first` on, summed in float64."""
        parts = [(self.product(rows) * rows).sum(dim=1, dtype=torch.float64) for rows in torch.split(error, _ROWS)]
        squares = torch.cat(parts)
        weights = self.weights_of(slice(first, first + len(squares)))
        return float((squares if weights is None else squares * weights[:, 0]).sum())

    def weights_of(self, rows: slice) -> Tensor | None:
        """The diagonal of D for some rows, as a column [rows, 1]."""
        return None if self.row_weights is None else self.row_weights[rows, None]

    def whiten_(self, error: Tensor) -> Tensor:
        """Overwrite an error [m, n] with D^½ E L, whose plain sum of squares is the weighted error of E."""
        for first in range(0, len(error), _ROWS):
            rows = slice(first, first + _ROWS)
            weights = self.weights_of(rows)
            error[rows] = self.whiten_inputs(error[rows] if weights is None else error[rows] * weights.sqrt())
        return error

    def whiten_inputs(self, rows: Tensor) -> Tensor:
        """Rows [rows, n] times L: their plain squared distances are those of the layer's outputs."""
        return rows if self.hessian is None else rows @ self.root

    def unwhiten_left(self, left: Tensor) -> Tensor:
        """D^-½ A for a left factor A [m, r] of a whitened matrix."""
        return left if self.row_weights is None else left / self.row_weights.sqrt()[:, None]

    def unwhiten_right(self, right: Tensor) -> Tensor:
        """B L⁻¹ for a right factor B [r, n] of a whitened matrix."""
        if self.hessian is None:
            return right
        unwhitened: Tensor = torch.linalg.solve_triangular(self.root, right, upper=False, left=False)
        return unwhitened

    @cached_property
    def root(self) -> Tensor:
        """L, the Cholesky factor of H = L Lᵀ, lower triangular [n, n]; ValueError for H = I.

        Because L is triangular, it also describes how columns compensate each other's errors: in the whitened error E
        L, a column of E can cancel what later columns contribute to its own column of E L, and nothing else. Columns
        are therefore processed from the last to the first.
        """
        return self.factor(self.require_hessian())

    def require_hessian(self) -> Tensor:
        """H; ValueError for the plain metric, which stores none."""
        if self.hessian is None:
            raise ValueError(
                f"{self.name}: the plain metric has no Hessian; pass the second moment of the inputs to Metric"
            )
        return self.hessian

    def factor(self, hessian: Tensor) -> Tensor:
        """Cholesky factor of H, or of each of several blocks on its diagonal, [..., n, n].

        Raises:
            InvalidWeightError: H is not positive definite in float32.
        """
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(hessian)
        if bool((info != 0).any()):
            raise InvalidWeightError(
                f"{self.name}: the second moment of its inputs is not positive definite in float32, because the inputs"
                " are too similar; calibrate on more text, or exclude this tensor"
            )
        return factor

    @property
    def column_weights(self) -> Tensor | None:
        """Cost of an error in each column after earlier columns have compensated it: diag(L)², [n]; None for H = I."""
        return None if self.hessian is None else self.root.diagonal().square()


def _damped(hessian: Tensor, tokens: int | None, name: str) -> Tensor:
    mean = float(hessian.diagonal().double().mean())
    if mean == 0:
        raise InvalidWeightError(
            f"{name}: the second moment of its inputs is zero, because all inputs were zero;"
            " calibrate on more text, or exclude this tensor"
        )
    if not 0 < mean < float("inf") or count_nonfinite(hessian):
        raise InvalidWeightError(
            f"{name}: the second moment of its inputs overflowed, its mean diagonal is {mean};"
            " calibrate on another text, or exclude this tensor"
        )
    damped = hessian.float().div_(mean)
    damped.diagonal().add_(_DAMPING + (_SAMPLING_DAMPING * len(hessian) / tokens if tokens else 0.0))
    return damped


def _normalized(row_weights: Tensor, name: str) -> Tensor:
    mean = float(row_weights.double().mean())
    if not 0 < mean < float("inf") or not bool((row_weights >= 0).all()):
        raise InvalidWeightError(
            f"{name}: row weights have the mean {mean}, expected finite weights that are not negative;"
            " calibrate on another text"
        )
    return (row_weights.float() / mean).clamp_(min=_LEAST_ROW_WEIGHT)

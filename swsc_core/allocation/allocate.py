"""Allocation of a budget of bytes to matrices, given the bytes and the predicted loss of each choice.

The task is to minimize Σ loss subject to Σ bytes ≤ budget. For a Lagrange multiplier λ each matrix takes the choice of
least loss + λ · bytes, a vertex of the lower convex hull of its curve (Shoham and Gersho 1988). The edges of all hulls,
from steep to flat, lead through these solutions in order. The remainder of the budget is then spent on single steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

from swsc_core.method.spec import Spec


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix.

    Attributes:
        spec: how the matrix is compressed.
        nbytes: stored bytes.
        loss: predicted loss, in the same unit for all matrices.
    """

    spec: Spec
    nbytes: int
    loss: float


def allocate(curves: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """The choice for each matrix of least total loss within `budget` bytes.

    Args:
        curves: the choices of each matrix, in any order.
        budget: bytes of all matrices together.

    Raises:
        ValueError: the smallest choices together are larger than the budget; the message states their size.
    """
    hulls = [lower_hull(curve) for curve in curves]
    chosen = [hull[0] for hull in hulls]
    remaining = budget - sum(choice.nbytes for choice in chosen)
    if remaining < 0:
        least = budget - remaining
        raise ValueError(f"{budget:,} bytes are less than the smallest choices take, {least:,}; raise the budget")
    steps = [(-_gain(hull[0], hull[1]), index, 1) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapify(steps)
    while steps:
        _, index, step = heappop(steps)
        hull = hulls[index]
        extra = hull[step].nbytes - chosen[index].nbytes
        if extra <= remaining:
            remaining -= extra
            chosen[index] = hull[step]
            if step + 1 < len(hull):
                heappush(steps, (-_gain(hull[step], hull[step + 1]), index, step + 1))
    return _spend(curves, chosen, remaining)


def equal_shares(counts: Sequence[int], least: Sequence[int], budget: int) -> list[int]:
    """Bytes of each matrix at equal bits per weight, together at most `budget`.

    A matrix whose smallest choice takes more gets the bytes of that choice, and the others share the remainder equally.

    Args:
        counts: weights of each matrix.
        least: bytes of the smallest choice of each matrix.
        budget: bytes of all matrices together.
    """
    at_least: set[int] = set()
    while True:
        sharing = [index for index in range(len(counts)) if index not in at_least]
        shared_bytes = budget - sum(least[index] for index in at_least)
        bytes_per_weight = Fraction(shared_bytes, max(1, sum(counts[index] for index in sharing)))
        above = {index for index in sharing if least[index] > bytes_per_weight * counts[index]}
        if not above:
            return [
                least[index] if index in at_least else int(bytes_per_weight * count)
                for index, count in enumerate(counts)
            ]
        at_least |= above


def lower_hull(curve: Sequence[Choice]) -> list[Choice]:
    """Choices that are optimal for some multiplier, in order of bytes; losses and gains per byte decrease."""
    hull: list[Choice] = []
    for choice in sorted(curve, key=lambda choice: (choice.nbytes, choice.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while hull and choice.nbytes == hull[-1].nbytes:
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(smaller: Choice, larger: Choice) -> float:
    """Decrease of the loss per byte."""
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)


def _spend(curves: Sequence[Sequence[Choice]], chosen: list[Choice], remaining: int) -> list[Choice]:
    """Spend `remaining` bytes on better choices, of the hull or not, one matrix at a time, the largest gain first."""
    while True:
        better = [
            (chosen[index].loss - choice.loss, -choice.nbytes, index, position)
            for index, curve in enumerate(curves)
            for position, choice in enumerate(curve)
            if choice.loss < chosen[index].loss and choice.nbytes - chosen[index].nbytes <= remaining
        ]
        if not better:
            return chosen
        _, _, index, position = max(better)
        remaining -= curves[index][position].nbytes - chosen[index].nbytes
        chosen[index] = curves[index][position]

"""Dividing a budget of bytes between matrices, given what each choice costs and loses.

Minimising Σ loss under Σ bytes ≤ budget: for a Lagrange multiplier λ every matrix takes the choice of least
loss + λ · bytes, which lies on the lower convex hull of its curve (Shoham and Gersho 1988). Walking the edges of all hulls
from steep to flat visits these solutions in order; what the last edge leaves of the budget is filled with single steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heappop, heappush

from swsc_core.method.spec import Spec


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: `nbytes` stored, `loss` foretold, in any unit that all matrices share."""

    spec: Spec
    nbytes: int
    loss: float


def allocate(curves: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """The choice of each matrix, of least total loss within `budget` bytes.

    Raises:
        ValueError: even the smallest choices are larger than the budget; the message says how large they are.
    """
    hulls = [lower_hull(curve) for curve in curves]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choice.nbytes for choice in chosen)
    if left < 0:
        raise ValueError(f"{budget:,} bytes do not hold the smallest choices, which take {budget - left:,}")
    steps = [(-_gain(hull[0], hull[1]), index, 1) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapify(steps)
    while steps:
        _, index, step = heappop(steps)
        hull = hulls[index]
        extra = hull[step].nbytes - chosen[index].nbytes
        if extra <= left:
            left -= extra
            chosen[index] = hull[step]
            if step + 1 < len(hull):
                heappush(steps, (-_gain(hull[step], hull[step + 1]), index, step + 1))
    return _fill(curves, chosen, left)


def equal_shares(counts: Sequence[int], least: Sequence[int], budget: int) -> list[int]:
    """Bytes of each matrix, of `counts` weights, at equal bits a weight; all together at most `budget`.

    One whose smallest choice, of `least` bytes, takes more has that, and the others share what it leaves.
    """
    dear: set[int] = set()
    while True:
        rest = [index for index in range(len(counts)) if index not in dear]
        share = Fraction(budget - sum(least[index] for index in dear), max(1, sum(counts[index] for index in rest)))
        dearer = {index for index in rest if least[index] > share * counts[index]}
        if not dearer:
            return [least[index] if index in dear else int(share * count) for index, count in enumerate(counts)]
        dear |= dearer


def lower_hull(curve: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some multiplier: bytes rise, losses fall, gains a byte fall."""
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
    """Loss that each further byte takes away."""
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)


def _fill(curves: Sequence[Sequence[Choice]], chosen: list[Choice], left: int) -> list[Choice]:
    """Spend what is left on single better choices, hull or not, the most useful first."""
    while True:
        better = [
            (chosen[index].loss - choice.loss, -choice.nbytes, index, place)
            for index, curve in enumerate(curves)
            for place, choice in enumerate(curve)
            if choice.loss < chosen[index].loss and choice.nbytes - chosen[index].nbytes <= left
        ]
        if not better:
            return chosen
        _, _, index, place = max(better)
        left -= curves[index][place].nbytes - chosen[index].nbytes
        chosen[index] = curves[index][place]

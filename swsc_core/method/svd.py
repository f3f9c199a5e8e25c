"""Truncated SVD of an error matrix, stored as U_r Σ^½ and Σ^½ V_r (paper, section III-C).

Small matrices and large ranks go through LAPACK or cuSOLVER. Large matrices go through a randomised block Krylov
iteration (Musco and Musco 2015, algorithm 2), which grows its subspace until the energy of the leading r directions
in it stops growing: error matrices of K-Means have flat spectra, on which a fixed number of steps is either too few or
wasteful, and on which the Krylov subspace needs about a third of the products of plain subspace iteration.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swsc_core.checks import require_range

_EXACT_SIDE = 1024  # up to this smaller side the exact SVD costs under a second on one core
_ROWS = 512  # whose squares are summed at a time
_BLOCK = 64  # columns that the subspace grows by: wide enough for GEMM, narrow enough for few wasted products


@dataclass(frozen=True)
class LowRank:
    """Rank-r approximation `left @ right` of an m×n matrix.

    Attributes:
        left: float32 [m, r], U_r Σ^½.
        right: float32 [r, n], Σ^½ V_r.
        solver: which of the two ways was taken.
        n_iter: blocks of the Krylov subspace; 0 for the exact way.
    """

    left: Tensor
    right: Tensor
    solver: Literal["none", "exact", "randomised"]
    n_iter: int


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0, tolerance: float = 5e-4) -> LowRank:
    """Best approximation of `matrix` by `left @ right` of rank `rank`.

    Args:
        matrix: float32 [m, n] on any device; not changed.
        rank: 0 to min(m, n).
        seed: of the random start of the iteration.
        tolerance: the iteration ends when a subspace grown by a fifth lowers the squared error by less than this
            share of it.

    Raises:
        ValueError: rank out of range.
    """
    m, n = matrix.shape
    require_range("truncated_svd", "rank", rank, 0, min(m, n))
    if rank == 0:
        return LowRank(matrix.new_empty(m, 0), matrix.new_empty(0, n), "none", 0)
    if is_exact(min(m, n), rank):
        u, s, vh = _svd(matrix)
        return _split(u, s, vh, rank, "exact", 0)
    basis, image, n_iter = _dominant_subspace(matrix, rank, seed, tolerance)
    u, s, vh = _svd(image)
    return _split(basis @ u, s, vh, rank, "randomised", n_iter)


def is_exact(side: int, rank: int) -> bool:
    """Whether matrices of this smaller side go through LAPACK or cuSOLVER for this rank."""
    return side <= _EXACT_SIDE or rank > side // 4


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], singular values [k] in falling order and Vᵀ [k, n], k = min(m, n).

    On a GPU from the eigenvectors of A Aᵀ in float64: cuSOLVER's SVD is one of Jacobi's kind, slow from some 500 columns on.
    Squares lose half of the digits, and half of those of float64 are more than float32 has.
    """
    if not matrix.is_cuda:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    return by_eigenvectors(matrix)


def by_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_svd` on a GPU, on any device. Directions of no weight are zeros on one side: nothing is lost of the product."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = by_eigenvectors(matrix.T)
        return vh.T, s, u.T
    wide = matrix.double()
    squares, directions = torch.linalg.eigh(wide @ wide.T)
    s, u = squares.flip(0).clamp_(min=0).sqrt(), directions.flip(1)
    inverse = torch.where(s > s[0] * torch.finfo(torch.float32).eps, 1 / s, 0)
    return u.to(matrix.dtype), s.to(matrix.dtype), (inverse[:, None] * (u.T @ wide)).to(matrix.dtype)


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int, solver: Literal["exact", "randomised"], n_iter: int) -> LowRank:
    root = s[:rank].sqrt()
    return LowRank((u[:, :rank] * root).contiguous(), root[:, None] * vh[:rank], solver, n_iter)


def _dominant_subspace(matrix: Tensor, rank: int, seed: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """Orthonormal `basis` [m, rank] of the leading left singular directions, and `image` = basisᵀ · matrix [rank, n].

    Grows up to the whole space, where the result is exact: it always reaches the tolerance.
    """
    m, n = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(matrix @ torch.randn(n, _BLOCK, generator=generator).to(matrix)).Q
    basis, image = block, block.T @ matrix
    total, captured, n_iter, check_at = _energy(matrix), -1.0, 1, rank + _BLOCK
    while basis.shape[1] < m:
        exhausted = float(image.square().sum(dtype=torch.float64)) >= total * (1 - 1e-6)
        if exhausted and basis.shape[1] >= rank:
            break
        block = _orthonormal_to(basis, matrix @ image[-block.shape[1] :].T, generator)[:, : m - basis.shape[1]]
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, block.T @ matrix])
        n_iter += 1
        if basis.shape[1] < check_at:
            continue
        check_at = basis.shape[1] * 6 // 5  # the check costs as much as several blocks: not at each of them
        energies = torch.linalg.eigvalsh((image @ image.T).double())
        before, captured = captured, float(energies[-rank:].sum())
        if captured - before <= tolerance * (total - captured):
            break
    directions = torch.linalg.eigh((image @ image.T).double()).eigenvectors[:, -rank:].to(matrix)
    return basis @ directions, directions.T @ image, n_iter


def _energy(matrix: Tensor) -> float:
    """Sum of squares in float64, some rows at a time."""
    return math.fsum(float(rows.square().sum(dtype=torch.float64)) for rows in matrix.split(_ROWS))


def _orthonormal_to(basis: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span `block` beyond the span of `basis`; twice, because once loses digits.

    Where `block` holds nothing new, what is left of it is rounding, which may lie along `basis` again and again (it does
    for a matrix of ones). A little noise, too weak to turn true directions, makes such columns random instead.
    """
    noise = torch.randn(block.shape, generator=generator).to(block)
    block = block + noise * (1e-6 * block.square().mean(dim=0).sqrt() + torch.finfo(block.dtype).tiny)
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block

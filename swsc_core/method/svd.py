"""Truncated SVD of an error matrix as the factors U_r Σ^½ and Σ^½ V_r (paper, section III-C).

Small matrices and large ranks use LAPACK or cuSOLVER. Large matrices use a randomized block Krylov iteration (Musco and
Musco 2015, algorithm 2), whose subspace grows until the squared norm that its leading r directions capture stops
growing. Error matrices of K-Means have flat spectra: a fixed number of iterations would be too small or wasteful, and
the Krylov subspace needs about a third of the products of plain subspace iteration.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swsc_core.checks import require_range

# Smaller side up to which the exact SVD takes less than a second on one core.
_EXACT_SIDE = 1024
# Rows whose squares are summed at a time.
_ROWS = 512
# Columns that the subspace grows by: wide enough for an efficient GEMM, narrow enough to waste few products.
_BLOCK = 64
# The subspace is checked when it has grown by this ratio, because a check costs as much as several blocks.
_CHECK_NUMERATOR, _CHECK_DENOMINATOR = 6, 5
# Share of the squared norm outside the subspace below which the subspace contains the whole matrix.
_EXHAUSTED = 1e-6
# Relative noise that is added to new directions: too weak to change true directions, and random where they are rounding
# errors.
_NOISE = 1e-6


@dataclass(frozen=True)
class LowRank:
    """Rank-r approximation `left @ right` of an m×n matrix.

    Attributes:
        left: float32 [m, r], U_r Σ^½.
        right: float32 [r, n], Σ^½ V_r.
        solver: the algorithm that was used; "none" for rank 0.
        n_iter: blocks of the Krylov subspace; 0 for the exact SVD.
    """

    left: Tensor
    right: Tensor
    solver: Literal["none", "exact", "randomised"]
    n_iter: int


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0, tolerance: float = 5e-4) -> LowRank:
    """Best approximation of `matrix` by a product of rank `rank` (paper, section III-C).

    Args:
        matrix: float32 [m, n] on any device; not changed.
        rank: 0 to min(m, n).
        seed: of the random start of the iteration.
        tolerance: the iteration ends when growing the subspace by a fifth lowers the squared error by less than this
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
    """Whether a matrix whose smaller side is `side` is decomposed exactly, for this rank."""
    return side <= _EXACT_SIDE or rank > side // 4


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], singular values [k] in descending order and Vᵀ [k, n], with k = min(m, n)."""
    if matrix.is_cuda:
        return svd_by_eigenvectors(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def svd_by_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD from the eigenvectors of A Aᵀ in float64: U [m, k], singular values [k] in descending order and Vᵀ [k, n].

    cuSOLVER's SVD uses Jacobi's method, which is slow from about 500 columns on. Squaring loses half of the digits, but
    half of the digits of float64 are more than float32 has. Directions of singular value zero are zero vectors on one
    side, which does not change the product.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = svd_by_eigenvectors(matrix.T)
        return vh.T, s, u.T
    wide = matrix.double()
    squares, directions = torch.linalg.eigh(wide @ wide.T)
    s, u = squares.flip(0).clamp_(min=0).sqrt(), directions.flip(1)
    inverse = torch.where(s > s[0] * torch.finfo(torch.float32).eps, 1 / s, 0)
    return u.to(matrix.dtype), s.to(matrix.dtype), (inverse[:, None] * (u.T @ wide)).to(matrix.dtype)


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int, solver: Literal["exact", "randomised"], n_iter: int) -> LowRank:
    """The factors U_r Σ^½ and Σ^½ V_r."""
    root = s[:rank].sqrt()
    return LowRank((u[:, :rank] * root).contiguous(), root[:, None] * vh[:rank], solver, n_iter)


def _dominant_subspace(matrix: Tensor, rank: int, seed: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """Leading left singular directions by block Krylov iteration (Musco and Musco 2015, algorithm 2).

    The subspace grows up to the whole space, where the result is exact, so the tolerance is always reached.

    Returns:
        Orthonormal `basis` [m, rank], its `image` basisᵀ · matrix [rank, n], and the number of blocks.
    """
    m, n = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(matrix @ torch.randn(n, _BLOCK, generator=generator).to(matrix)).Q
    basis, image = block, block.T @ matrix
    total, captured, n_iter, check_at = _squared_norm(matrix), -1.0, 1, rank + _BLOCK
    while basis.shape[1] < m:
        exhausted = float(image.square().sum(dtype=torch.float64)) >= total * (1 - _EXHAUSTED)
        if exhausted and basis.shape[1] >= rank:
            break
        block = _orthonormal_to(basis, matrix @ image[-block.shape[1] :].T, generator)[:, : m - basis.shape[1]]
        basis, image = torch.cat([basis, block], dim=1), torch.cat([image, block.T @ matrix])
        n_iter += 1
        if basis.shape[1] < check_at:
            continue
        check_at = basis.shape[1] * _CHECK_NUMERATOR // _CHECK_DENOMINATOR
        squares = torch.linalg.eigvalsh((image @ image.T).double())
        previous, captured = captured, float(squares[-rank:].sum())
        if captured - previous <= tolerance * (total - captured):
            break
    directions = torch.linalg.eigh((image @ image.T).double()).eigenvectors[:, -rank:].to(matrix)
    return basis @ directions, directions.T @ image, n_iter


def _squared_norm(matrix: Tensor) -> float:
    """Sum of squares in float64, some rows at a time."""
    return math.fsum(float(rows.square().sum(dtype=torch.float64)) for rows in torch.split(matrix, _ROWS))


def _orthonormal_to(basis: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span the part of `block` outside the span of `basis`.

    The projection is applied twice, because once loses digits. Where `block` adds nothing to the span, its remainder is
    rounding error, which may fall into the span of `basis` repeatedly (it does for a matrix of ones). Noise makes such
    columns random directions.
    """
    noise = torch.randn(block.shape, generator=generator).to(block)
    block = block + noise * (_NOISE * block.square().mean(dim=0).sqrt() + torch.finfo(block.dtype).tiny)
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block

"""SWSC on one matrix (paper, section III): cluster the channels, keep their means, compensate the error by an SVD."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.bits import ChannelAxis, Geometry, label_bits
from swsc_core.checks import WeightError, derive_seed, require_matrix, require_range
from swsc_core.kmeans import kmeans
from swsc_core.lowrank import truncated_svd
from swsc_core.packing import pack, unpack


@dataclass(frozen=True)
class SwscMatrix:
    """A compressed m×n matrix: what the paper stores, in the storage dtype.

    Attributes:
        centroids: [k, length], the representative vectors; length is n for channel_axis "output", m for "input".
        labels: uint8 [packed_bytes(channels, ceil(log2 k))], the label vector; empty for k < 2.
        left, right: [m, r] and [r, n], U_r Σ^½ and Σ^½ V_r of the error.
    """

    shape: tuple[int, int]
    channel_axis: ChannelAxis
    centroids: Tensor
    labels: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class CompressStats:
    """What a compression measured: sums of squares of the clustering alone, of the final error, and seconds."""

    cluster_error: float
    kmeans_iterations: int
    kmeans_seconds: float
    svd_seconds: float
    svd_solver: str


def compress(
    weight: Tensor,
    n_clusters: int,
    rank: int,
    *,
    channel_axis: ChannelAxis = "output",
    n_init: int | None = None,
    seed: int = 0,
    storage_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> tuple[SwscMatrix, CompressStats]:
    """Compress `weight` to `n_clusters` representative channels, a label a channel, and a rank-`rank` error term.

    The error is taken against the centroids as they are stored, so that the SVD makes up for their rounding too.

    Args:
        weight: [m, n] of float32, float16, bfloat16 or fp8; not changed. Arithmetic is in float32.
        n_clusters: 0 to the number of channels; fewer are stored when fewer distinct channels exist.
        rank: 0 to min(m, n).
        seed: of the run; the matrix' own seed is derived from it and `name`.
        storage_dtype: of centroids and factors; the weight's own by default.

    Raises:
        ValueError: not a finite matrix, n_clusters or rank out of range.
    """
    require_matrix(name, weight)
    m, n = weight.shape
    require_range(name, "n_clusters", n_clusters, 0, Geometry(m, n, channel_axis).channels)
    require_range(name, "rank", rank, 0, min(m, n))
    dtype = storage_dtype or weight.dtype
    dense, tensor_seed = weight.float(), derive_seed(seed, name)
    started = time.perf_counter()
    centroids, labels, iterations = _share(dense, n_clusters, channel_axis, n_init, tensor_seed, dtype)
    clustered_at = time.perf_counter()
    if not bool(torch.isfinite(centroids.float()).all()):
        raise WeightError(f"{name}: centroids overflow {dtype}; choose a wider storage dtype")
    error = dense - _spread(centroids, labels, channel_axis, (m, n))
    low_rank = truncated_svd(error, rank, seed=tensor_seed)
    stats = CompressStats(
        cluster_error=float(error.square().sum(dtype=torch.float64)),
        kmeans_iterations=iterations,
        kmeans_seconds=clustered_at - started,
        svd_seconds=time.perf_counter() - clustered_at,
        svd_solver=low_rank.solver,
    )
    packed = pack(labels, label_bits(len(centroids)))
    left, right = low_rank.left.to(dtype), low_rank.right.to(dtype)
    return SwscMatrix((m, n), channel_axis, centroids, packed, left, right), stats


def restore(matrix: SwscMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """W_New = W' + left · right, [m, n], computed in float32 and rounded to `dtype` (the storage dtype by default)."""
    channels = Geometry(*matrix.shape, matrix.channel_axis).channels
    labels = unpack(matrix.labels, label_bits(len(matrix.centroids)), channels)
    dense = _spread(matrix.centroids, labels, matrix.channel_axis, matrix.shape)
    if matrix.left.shape[1]:
        dense = dense + matrix.left.float() @ matrix.right.float()
    return dense.to(dtype or matrix.centroids.dtype)


def _share(
    dense: Tensor, k: int, axis: ChannelAxis, n_init: int | None, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Stored centroids [k, length], labels int64 [channels] and the iterations of the run of Lloyd that it came from."""
    points = dense if axis == "output" else dense.T.contiguous()
    if k == 0:
        labels = torch.zeros(len(points), dtype=torch.int64, device=dense.device)
        return points.new_empty(0, points.shape[1]).to(dtype), labels, 0
    result = kmeans(points, k, n_init=n_init, seed=seed)
    return result.centroids.to(dtype), result.labels, len(result.inertia_history)


def _spread(centroids: Tensor, labels: Tensor, axis: ChannelAxis, shape: tuple[int, int]) -> Tensor:
    """W' in float32: each channel replaced by the centroid of its cluster; zero when there are no clusters."""
    if len(centroids) == 0:
        return torch.zeros(shape, dtype=torch.float32, device=centroids.device)
    rows = centroids.float()[labels]
    return rows if axis == "output" else rows.T.contiguous()

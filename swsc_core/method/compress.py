"""SWSC on one matrix (paper, section III): cluster similar channels, compensate the error by a truncated SVD.

The paper clusters whole channels and decomposes the error once, both by plain squared error. Here the distance is a
metric (metric.py), channels may be cut into segments (segmentation.py), and clustering and SVD may alternate. The
paper's form is the plain metric with whole channels and no alternation, and it runs through the same code.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, count_nonfinite, derive_seed, require_matrix
from swsc_core.method.codebook_fit import CodebookFit
from swsc_core.method.kmeans import kmeans
from swsc_core.method.metric import Metric
from swsc_core.method.pairwise import means_of
from swsc_core.method.spec import SwscSpec
from swsc_core.method.stored_values import store_scales, store_values
from swsc_core.method.svd import truncated_svd
from swsc_core.method.swsc_matrix import SwscMatrix
from swsc_core.storage.bits import Geometry, label_bits
from swsc_core.storage.packing import pack

# Refinement ends when a round lowers the weighted error by less than this share of it.
MIN_RELATIVE_IMPROVEMENT = 1e-3


@dataclass(frozen=True)
class CompressStats:
    """Measurements of one compression.

    Attributes:
        cluster_error: weighted error of the clustering alone, W − W′, in the spec's metric.
        weighted_error: weighted error of the whole approximation, W − W_New.
        weight_norm: weighted error of approximating W by zero.
        rounds: refinement rounds that ran, including the last one if it was undone.
        kmeans_seconds, svd_seconds: time spent on clustering and on the compensation.
    """

    cluster_error: float
    weighted_error: float
    weight_norm: float
    rounds: int
    kmeans_seconds: float
    svd_seconds: float

    def to_json(self) -> dict[str, float]:
        """The measurements under the keys that reports have used since their first version."""
        return {
            "cluster_error": self.cluster_error,
            "energy": self.weighted_error,
            "weight_energy": self.weight_norm,
            "rounds": self.rounds,
            "kmeans_seconds": self.kmeans_seconds,
            "svd_seconds": self.svd_seconds,
        }


def compress(
    weight: Tensor,
    spec: SwscSpec,
    *,
    metric: Metric | None = None,
    seed: int = 0,
    storage_dtype: torch.dtype | None = None,
    name: str = "weight",
) -> tuple[SwscMatrix, CompressStats]:
    """Compress `weight` according to `spec` (paper, section III).

    The error W_Err = W − W′ is taken against the centroids as they are stored, so that the SVD also compensates their
    rounding.

    Args:
        weight: [m, n] of float32, float16, bfloat16 or fp8; not changed. Arithmetic is in float32.
        spec: cluster count, rank and further choices.
        metric: cost of an error; required for a spec of metric "activations", plain squares by default.
        seed: of the run; the seed of the matrix is derived from it and `name`.
        storage_dtype: of centroids, factors and scales; by default the dtype of the weight.
        name: of the tensor, for its seed and for errors.

    Raises:
        ValueError: not a finite matrix, a spec that does not fit its shape, or a missing metric.
    """
    require_matrix(name, weight)
    spec.require_shape(name, (weight.shape[0], weight.shape[1]))
    if spec.metric == "activations" and metric is None:
        raise ValueError(f"{name}: metric activations needs the second moment of its inputs; calibrate first")
    dtype = storage_dtype or weight.dtype
    compression = _Compression(weight.float(), spec, metric or Metric(), derive_seed(seed, name), dtype)
    compression.run(name)
    return compression.matrix(), compression.stats()


class _Compression:
    """State of one compression.

    Attributes:
        fit: the clustering, which determines W′.
        left, right: stored factors of the error, [r, m] and [r, n].
        target: what the next round of clustering approximates: W minus the compensation.
    """

    def __init__(self, weight: Tensor, spec: SwscSpec, metric: Metric, seed: int, dtype: torch.dtype) -> None:
        self.weight, self.spec, self.metric, self.seed, self.dtype = weight, spec, metric, seed, dtype
        self.fit = CodebookFit(weight, metric, spec, dtype)
        self.target = weight
        self.left, self.right = (store_values(weight.new_zeros(0, side), None, dtype) for side in weight.shape)
        self.rounds, self.cluster_error, self.weighted_error = 0, 0.0, math.inf
        self.seconds = {"clustering": 0.0, "svd": 0.0}

    def run(self, name: str) -> None:
        """Cluster and compensate; then refine for as many rounds as the spec allows, while it helps."""
        with self._timed("clustering"):
            if self.spec.n_clusters:
                self._cluster()
        if count_nonfinite(self.fit.centroids.expand()):
            raise InvalidWeightError(f"{name}: centroids overflow {self.dtype}; choose a wider storage dtype")
        self._compensate()
        max_rounds = self.spec.rounds if self.spec.n_clusters else 0
        while self.rounds < max_rounds and self._refine():
            pass

    def _cluster(self) -> None:
        fit, layout = self.fit, self.fit.layout
        if self.spec.codebooks == 1 and layout.count == Geometry(layout.m, layout.n, layout.channel_axis).channels:
            self._cluster_channels()
        else:
            fit.start(self.weight, torch.Generator().manual_seed(self.seed))
            fit.assign(self.weight, feedback=self.spec.feedback)

    def _cluster_channels(self) -> None:
        """K-Means over whole channels (section III-B), whitened if the metric is.

        Means are linear: the means of whitened rows are the whitened means of the rows, so the centroids need no solve.
        """
        layout = self.fit.layout
        channels = layout.segments(self.fit.unscaled(self.weight))
        points = self.metric.whiten_inputs(channels) if layout.channel_axis == "output" else channels
        clustering = kmeans(points, self.spec.n_clusters, n_init=self.spec.n_init, seed=self.seed)
        centroids = clustering.centroids if points is channels else means_of(channels, clustering.labels)
        self.fit.adopt(clustering.labels, centroids)

    def _compensate(self) -> None:
        """Truncated SVD of the error W_Err = W − W′ in the whitened space (section III-C)."""
        with self._timed("svd"):
            if self.spec.rank:
                self._decompose_error()
                self.weighted_error = self._remaining_error()
            else:
                self.cluster_error = self.weighted_error = self._remaining_error()

    def _decompose_error(self) -> None:
        # Drop the previous round's target: the SVD then needs one matrix less.
        self.target = self.weight
        error = self._clustered().neg_().add_(self.weight)
        self.cluster_error = self.metric.weighted_error(error)
        low_rank = truncated_svd(self.metric.whiten_(error), self.spec.rank, seed=self.seed)
        del error
        left, right = self.metric.unwhiten_left(low_rank.left), self.metric.unwhiten_right(low_rank.right)
        self.left = store_values(left.T.contiguous(), self.spec.factor_bits, self.dtype)
        self.right = store_values(right.contiguous(), self.spec.factor_bits, self.dtype)
        self.target = torch.addmm(self.weight, self.left.expand().T, self.right.expand(), alpha=-1)

    def _refine(self) -> bool:
        """Refit, reassign and decompose once more; undo a round that does not help. Returns whether to continue."""
        previous = (self.fit.snapshot(), self.left, self.right, self.cluster_error, self.weighted_error)
        with self._timed("clustering"):
            self.fit.refit(self.target)
            self.fit.reassign(self.target)
        self._compensate()
        self.rounds += 1
        previous_error = previous[-1]
        if self.weighted_error < previous_error:
            return self.weighted_error < previous_error * (1 - MIN_RELATIVE_IMPROVEMENT)
        snapshot, self.left, self.right, self.cluster_error, self.weighted_error = previous
        self.fit.put_back(snapshot)
        return False

    def _clustered(self) -> Tensor:
        """W′ in float32; zero without clusters."""
        return self.fit.clustered() if self.spec.n_clusters else torch.zeros_like(self.weight)

    def _remaining_error(self) -> float:
        """Weighted error of W − W_New, as the stored values give it."""
        if self.spec.n_clusters:
            return self.fit.weighted_error(self.target)
        return self.metric.weighted_error(self.target)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def matrix(self) -> SwscMatrix:
        """The stored form of the result."""
        fit, codebooks = self.fit, self.spec.codebooks
        labels = pack(fit.labels.reshape(-1), label_bits(fit.centroids.shape[0] // codebooks))
        scales = None if fit.scales is None else store_scales(fit.scales[:, 0], self.dtype)
        return SwscMatrix(fit.layout, codebooks, fit.centroids, labels, scales, self.left, self.right)

    def stats(self) -> CompressStats:
        """Measurements of the result."""
        return CompressStats(
            self.cluster_error,
            self.weighted_error,
            self.metric.weighted_error(self.weight),
            self.rounds,
            self.seconds["clustering"],
            self.seconds["svd"],
        )

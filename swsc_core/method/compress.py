"""SWSC on one matrix (paper, section III): share between similar channels, compensate the error by an SVD.

The paper clusters whole channels and decomposes what is left, both by plain squared error, once. Here distance is a metric
(metric.py), a channel may be cut into segments (layout.py), and clustering and SVD may alternate; the paper's form is the
plain metric, whole channels and no alternation, and takes the same way through this file.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from swsc_core.checks import InvalidWeightError, derive_seed, not_finite, require_matrix
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

_HELPS = 1e-3  # share by which a round must lower the energy to be followed by another


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
    """Compress `weight` as `spec` says.

    The error is taken against the centroids as they are stored, so that the SVD makes up for their rounding too.

    Args:
        weight: [m, n] of float32, float16, bfloat16 or fp8; not changed. Arithmetic is in float32.
        metric: what an error costs; needed for spec.metric "activations", else plain squares.
        seed: of the run; the matrix' own seed is derived from it and `name`.
        storage_dtype: of centroids, factors and scales; the weight's own by default.

    Raises:
        ValueError: not a finite matrix, a spec that does not fit its shape, or a metric that is missing.
    """
    require_matrix(name, weight)
    shape = (weight.shape[0], weight.shape[1])
    if refusal := spec.shape_error(shape):
        raise ValueError(f"{name}: {refusal}")
    if spec.metric == "activations" and metric is None:
        raise ValueError(f"{name}: metric activations needs the second moment of its inputs; calibrate first")
    work = _Compression(
        weight.float(), spec, metric or Metric(), derive_seed(seed, name), storage_dtype or weight.dtype
    )
    work.run(name)
    return work.result()


class _Compression:
    """The state of one compression: what sharing gives, and the factors of what it leaves."""

    def __init__(self, dense: Tensor, spec: SwscSpec, metric: Metric, seed: int, dtype: torch.dtype) -> None:
        self.dense, self.spec, self.metric, self.seed, self.dtype = dense, spec, metric, seed, dtype
        self.sharing = CodebookFit(dense, metric, spec, dtype)
        self.seconds = {"sharing": 0.0, "svd": 0.0}
        self.rounds, self.cluster_error, self.energy = 0, 0.0, math.inf

    def run(self, name: str) -> None:
        started = time.perf_counter()
        if self.spec.n_clusters:
            self._first_sharing()
        self.seconds["sharing"] += time.perf_counter() - started
        if not_finite(self.sharing.centroids.expand()):
            raise InvalidWeightError(f"{name}: centroids overflow {self.dtype}; choose a wider storage dtype")
        self._decompose()
        while self.spec.n_clusters and self.rounds < self.spec.rounds and self._another_round():
            pass

    def _first_sharing(self) -> None:
        sharing, layout = self.sharing, self.sharing.layout
        if self.spec.codebooks == 1 and layout.count == Geometry(layout.m, layout.n, layout.channel_axis).channels:
            self._cluster_channels()
        else:
            sharing.start(torch.Generator().manual_seed(self.seed))
            sharing.assign(feedback=self.spec.feedback)

    def _cluster_channels(self) -> None:
        """K-Means over whole channels. Means are linear: those of whitened rows are the rows' own means, whitened."""
        layout, rows = self.sharing.layout, self.sharing.unscaled(slice(0, self.sharing.layout.m))
        points = layout.segments(rows)
        seen = self.metric.whiten_inputs(points) if layout.channel_axis == "output" else points
        found = kmeans(seen, self.spec.n_clusters, n_init=self.spec.n_init, seed=self.seed)
        self.sharing.adopt(found.labels, found.centroids if seen is points else means_of(points, found.labels))

    def _decompose(self) -> None:
        """The compensation: truncated SVD of what sharing leaves, in the metric's space."""
        started = time.perf_counter()
        if self.spec.rank:
            self._compensate()
        else:
            self.left, self.right = (
                store_values(self.dense.new_zeros(0, n), None, self.dtype) for n in self.dense.shape
            )
            self.cluster_error = self.energy = self._left()
        self.seconds["svd"] += time.perf_counter() - started

    def _compensate(self) -> None:
        self.sharing.target = self.dense  # a round's own is not needed any more: one matrix less while the SVD runs
        error = self._shared().neg_().add_(self.dense)
        self.cluster_error = self.metric.weighted_error(error)
        low_rank = truncated_svd(self.metric.whiten_(error), self.spec.rank, seed=self.seed)
        del error
        left, right = self.metric.unwhiten_left(low_rank.left), self.metric.unwhiten_right(low_rank.right)
        self.left = store_values(left.T.contiguous(), self.spec.factor_bits, self.dtype)
        self.right = store_values(right.contiguous(), self.spec.factor_bits, self.dtype)
        self.sharing.target = torch.addmm(self.dense, self.left.expand().T, self.right.expand(), alpha=-1)
        self.energy = self._left()

    def _left(self) -> float:
        """Energy of what the stored parts leave of the sharing's target."""
        return (
            self.sharing.weighted_error() if self.spec.n_clusters else self.metric.weighted_error(self.sharing.target)
        )

    def _another_round(self) -> bool:
        """Refit, reassign, decompose again; whether it helped. What does not help is taken back."""
        started = time.perf_counter()
        before = (self.sharing.snapshot(), self.left, self.right, self.cluster_error, self.energy)
        self.sharing.refit()
        self.sharing.reassign()
        self.seconds["sharing"] += time.perf_counter() - started
        self._decompose()
        self.rounds += 1
        if self.energy < before[-1]:
            return self.energy < before[-1] * (1 - _HELPS)
        state, self.left, self.right, self.cluster_error, self.energy = before
        self.sharing.put_back(state)
        return False

    def _shared(self) -> Tensor:
        """W' in float32; zero when there are no clusters."""
        return self.sharing.restored() if self.spec.n_clusters else torch.zeros_like(self.dense)

    def result(self) -> tuple[SwscMatrix, CompressStats]:
        stats = CompressStats(
            self.cluster_error, self.energy, self.metric.weighted_error(self.dense), self.rounds,
            self.seconds["sharing"], self.seconds["svd"],
        )  # fmt: skip
        sharing, k = self.sharing, self.sharing.centroids.shape[0] // self.spec.codebooks
        labels = pack(sharing.labels.reshape(-1), label_bits(k))
        scales = None if sharing.scales is None else store_scales(sharing.scales[:, 0], self.dtype)
        matrix = SwscMatrix(
            sharing.layout, self.spec.codebooks, sharing.centroids, labels, scales, self.left, self.right
        )
        return matrix, stats

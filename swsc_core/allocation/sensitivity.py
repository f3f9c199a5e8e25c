"""Prediction of the loss of a matrix under a spec, without compressing the matrix.

With error feedback, the weighted error is Σ D_i d_j e_ij² over rows i and columns j. Here e is the rounding error of
single segments, and d_j = L_jj² is the cost of an error in column j after earlier columns have compensated it
(metric.py). Rows are divided by their RMS α_i before quantization, so e² = distortion · α_i², where the distortion
depends on the spec and on the distribution of the weights, and hardly on the matrix. The weighted error is therefore
*sensitivity · relative distortion*, with sensitivity = Σ D_i α_i² · Σ d_j.
"""

import torch
from torch import Tensor

from swsc_core.method.compress import compress
from swsc_core.method.metric import Metric
from swsc_core.method.spec import SwscSpec

# Least number of rows that a distortion is measured on.
_ROWS = 256
# Least number of segments per centroid. A codebook fits fewer segments, which it is learnt from, too well.
_SEGMENTS_PER_CENTROID = 32
# Rows that are converted to float64 at a time.
_SLAB_ROWS = 512


def sensitivity(weight: Tensor, metric: Metric) -> float:
    """Σ D_i α_i² · Σ d_j of a weight [m, n], in the unit of `metric.weighted_error`."""
    slabs = torch.split(weight, _SLAB_ROWS)
    squares = torch.cat([slab.float().double().square().mean(dim=1) for slab in slabs])
    if metric.row_weights is not None:
        squares = squares * metric.row_weights
    columns = metric.column_weights
    return float(squares.sum()) * (weight.shape[1] if columns is None else float(columns.double().sum()))


def sampled_rows(shape: tuple[int, int], spec: SwscSpec) -> int:
    """Rows of a matrix that `relative_distortion` measures."""
    m, n = shape
    layout = spec.layout(shape)
    count = max(_ROWS, -(-_SEGMENTS_PER_CENTROID * spec.n_clusters * layout.size // n))
    # Segments along columns span several rows.
    count = -(-count // layout.row_step) * layout.row_step
    return count if spec.rank == 0 and count < m else m


def relative_distortion(weight: Tensor, spec: SwscSpec, metric: Metric, seed: int, name: str) -> float:
    """Weighted error under `spec` divided by the sensitivity; 1 for a weight of zeros.

    It is measured on evenly spaced rows, or on all rows if the spec has a rank, which depends on their number.
    """
    m = weight.shape[0]
    count = sampled_rows((m, weight.shape[1]), spec)
    if count < m:
        rows = torch.linspace(0, m - 1, count, device=weight.device).long()
        weight, metric = weight[rows], metric.of_rows(rows)
    stats = compress(weight, spec, metric=metric, seed=seed, name=name)[1]
    undistorted = sensitivity(weight, metric)
    return stats.weighted_error / undistorted if undistorted > 0 else 1.0

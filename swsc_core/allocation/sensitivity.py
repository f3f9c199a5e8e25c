"""What a spec will lose on a matrix, foretold without compressing it.

With error feedback the energy of an error is Σ over rows i and columns j of D_i d_j e_ij², where e is the rounding error of
single segments and d_j = L_jj² what an error of column j costs once earlier columns have made up for it (metric.py). Rows
are scaled to their RMS α_i before they share, so e² = share · α_i², and `share` depends on the spec and on the shape of the
weights' distribution, hardly on the matrix: the energy is share · reach, reach = Σ D_i α_i² · Σ d_j.
"""

import torch
from torch import Tensor

from swsc_core.method.compress import compress
from swsc_core.method.metric import Metric
from swsc_core.method.spec import SwscSpec

_ROWS = 256  # rows that a share is measured on, at the least
_SLAB_ROWS = 512  # that are held in float64 at a time
_SEGMENTS_PER_CENTROID = 32  # fewer would flatter: a codebook fits what it was learnt from


def sensitivity(weight: Tensor, metric: Metric) -> float:
    """Σ D_i α_i² · Σ d_j of a weight [m, n], in the units of `metric.weighted_error`."""
    slabs = weight.split(_SLAB_ROWS)  # in float64 the whole would be four copies of it
    rows = torch.cat([slab.float().double().square().mean(dim=1) for slab in slabs])
    if metric.row_weights is not None:
        rows = rows * metric.row_weights
    columns = metric.column_weights
    return float(rows.sum()) * (weight.shape[1] if columns is None else float(columns.double().sum()))


def relative_distortion(weight: Tensor, spec: SwscSpec, metric: Metric, seed: int, name: str) -> float:
    """Energy that `spec` leaves of the reach, measured on evenly spaced rows (all, where it has a rank); 1 for a zero weight."""
    m, n = weight.shape
    layout = spec.layout((m, n))
    wanted = max(_ROWS, -(-_SEGMENTS_PER_CENTROID * spec.n_clusters * layout.size // n))
    wanted = -(-wanted // layout.row_step) * layout.row_step  # segments down the columns take whole ones
    if spec.rank == 0 and wanted < m:
        rows = torch.linspace(0, m - 1, wanted, device=weight.device).long()
        weight, metric = weight[rows], metric.of_rows(rows)
    stats = compress(weight, spec, metric=metric, seed=seed, name=name)[1]
    whole = sensitivity(weight, metric)
    return stats.weighted_error / whole if whole > 0 else 1.0  # of nothing, nothing is kept

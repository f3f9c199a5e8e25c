"""y = x Wᵀ for a compressed matrix W, without restoring W.

With whole channels (paper, section III) x is multiplied by the k centroids only. The labels select the product of each
output (output channels), or which inputs are added up before (input channels). Channels that are cut into segments have
too many labels for that: W′ is restored in slabs of rows, and each slab is multiplied and freed. The compensation is
two thin products.

Every sum is a matrix product, so that results do not depend on the order in which threads finish, as those of
`index_add_` on CUDA do.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, one_hot
from torch.utils.checkpoint import checkpoint

from swsc_core.method.swsc_matrix import SwscMatrix, take_rows

# Weights that are restored at a time.
_SLAB = 1 << 22


def swsc_matmul(x: Tensor, matrix: SwscMatrix) -> Tensor:
    """x [..., n] times Wᵀ: [..., m], in the dtype of x, or of autocast if it is enabled.

    The result is differentiable in x, and in centroids, scales and factors that are stored as floating point values.
    """
    y = _clustered_matmul(x, matrix)
    if matrix.scales is not None:
        y = y * matrix.scales.to(y.dtype)
    if matrix.left.shape[0]:
        y = y + linear(linear(x, matrix.right.expand(x.dtype)), matrix.left.expand(x.dtype).T)
    return y


def _clustered_matmul(x: Tensor, matrix: SwscMatrix) -> Tensor:
    """x [..., n] times W′ᵀ before rows are scaled: [..., m]."""
    layout = matrix.layout
    if not matrix.n_clusters:
        # Zeros in the dtype of products, which autocast may change.
        return linear(x[..., :1], x.new_zeros(layout.m, 1))
    centroids = matrix.centroids.expand(x.dtype)
    if not matrix.shares_whole_channels:
        return _matmul_by_slabs(x, matrix, centroids)
    labels = matrix.indices().reshape(-1)
    if layout.channel_axis == "output":
        y = linear(x, centroids)
        if y.is_cuda and y.requires_grad:
            # The gradient of `index_select` has no fixed order of summation there.
            return embedding(labels, y.reshape(-1, y.shape[-1]).T).T.reshape(*y.shape[:-1], -1)
        return y.index_select(-1, labels)
    return linear(x @ one_hot(labels.long(), matrix.n_clusters).to(x.dtype), centroids.T)


def _matmul_by_slabs(x: Tensor, matrix: SwscMatrix, centroids: Tensor) -> Tensor:
    def multiply(x: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
        return linear(x, matrix.layout.matrix(take_rows(centroids, indices.reshape(-1))))

    parts = []
    for indices in matrix.slabs(_SLAB):
        if torch.is_grad_enabled() and (x.requires_grad or centroids.requires_grad):
            # Autograd would keep every slab, which together are W. Slabs are restored again in the backward pass
            # instead.
            parts.append(checkpoint(multiply, x, centroids, indices, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(multiply(x, centroids, indices))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

"""y = x Wᵀ of a compressed matrix, without building W.

Shared weights are shared work (paper, section III): with whole channels a product with the k centroids is all there is to
multiply, and labels say which outputs repeat it (output channels) or which inputs are added up first (input channels).
Channels that are cut into segments have too many labels for that; there W' is put together slab by slab of its rows, each
slab multiplied and let go. The compensation is two thin products in either case.

Every sum is a matrix product, so that results do not depend on the order in which threads finish (`index_add_` on CUDA does).
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, one_hot
from torch.utils.checkpoint import checkpoint

from swsc_core.method.swsc_matrix import SwscMatrix, take_rows

_SLAB = 1 << 22  # weights that are put together at a time


def product(x: Tensor, matrix: SwscMatrix) -> Tensor:
    """x [..., n] times Wᵀ: [..., m], in the dtype of x (of autocast, where it is on).

    Differentiable in x, and in centroids, scales and factors that are stored as floating point values.
    """
    y = _shared(x, matrix)
    if matrix.scales is not None:
        y = y * matrix.scales.to(y.dtype)
    if matrix.left.shape[0]:
        y = y + linear(linear(x, matrix.right.expand(x.dtype)), matrix.left.expand(x.dtype).T)
    return y


def _shared(x: Tensor, matrix: SwscMatrix) -> Tensor:
    layout = matrix.layout
    if not matrix.n_clusters:
        return linear(x[..., :1], x.new_zeros(layout.m, 1))  # zeros, in the dtype that autocast gives to products
    centroids = matrix.centroids.expand(x.dtype)
    if not matrix.shares_whole_channels:
        return _by_slabs(x, matrix, centroids)
    labels = matrix.indices().reshape(-1)
    if layout.channel_axis == "output":
        y = linear(x, centroids)
        if y.is_cuda and y.requires_grad:  # the gradient of `index_select` is a sum in random order there
            return embedding(labels, y.reshape(-1, y.shape[-1]).T).T.reshape(*y.shape[:-1], -1)
        return y.index_select(-1, labels)
    return linear(x @ one_hot(labels.long(), matrix.n_clusters).to(x.dtype), centroids.T)


def _by_slabs(x: Tensor, matrix: SwscMatrix, centroids: Tensor) -> Tensor:
    def multiply(x: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
        return linear(x, matrix.layout.matrix(take_rows(centroids, indices.reshape(-1))))

    parts = []
    for indices in matrix.slabs(_SLAB):
        if torch.is_grad_enabled() and (x.requires_grad or centroids.requires_grad):
            # a slab would be kept for the gradient, all of them together are W: put together again instead
            parts.append(checkpoint(multiply, x, centroids, indices, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(multiply(x, centroids, indices))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

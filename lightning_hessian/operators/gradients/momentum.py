"""Momentum over the gradients of the history matrix, at fixed parameters.

The buffer of SGD with momentum is m_t = beta m_{t-1} + g_t with m_1 = g_1, so the T buffers are
L G with L[t, s] = beta^(t - s) for s <= t, and 0 above the diagonal. Their Gram matrix is then
L (G G^T) L^T: spectra with momentum need no gradient computed or stored anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.operators.gradients.history import GradientHistory
from lightning_hessian.operators.gradients.rows import GradientRows


def apply_momentum(gradients: GradientRows, gram: Tensor, momentum: float) -> None:
    """Put the buffers in the place of the gradients: in their inner products, and where stored.

    Gradients that are computed when asked for stay as they are; `weights_of_gradients` combines
    them. The products are transformed, and not taken of the stored buffers, which are rounded.

    Args:
        gradients: All T, of all ranks together.
        gram: Their inner products, float64 [T, T].
        momentum: beta.
    """
    with gradients.shard.ranks.together():
        gram_with_momentum(gram, momentum)
        if isinstance(gradients, GradientHistory):
            accumulate_momentum(torch.from_numpy(gradients.values), momentum)


def accumulate_momentum(rows: Tensor, momentum: float) -> None:
    """Replace gradients g_t, in their order, by the buffers m_t = momentum m_{t-1} + g_t, in place.

    Args:
        rows: [T, n].
        momentum: beta of `torch.optim.SGD`, whose ``dampening`` is 0 here as by default.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0], [1.0], [1.0]])
        >>> accumulate_momentum(rows, 0.5)
        >>> rows.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    for i in range(1, len(rows)):
        rows[i].add_(rows[i - 1], alpha=momentum)


def gram_with_momentum(gram: Tensor, momentum: float) -> None:
    """Replace the inner products of T gradients by those of their buffers, in place.

    Args:
        gram: g_s . g_t, float64 [T, T].
        momentum: beta.
    """
    accumulate_momentum(gram, momentum)
    accumulate_momentum(gram.T, momentum)
    # Both passes round by themselves; the eigensolvers take a matrix that is symmetric to the bit.
    for i in range(1, len(gram)):
        gram[:i, i] = gram[i, :i]


def weights_of_gradients(weights: Tensor, momentum: float) -> Tensor:
    """Return ``weights @ L``: what combines buffers by ``weights`` combines gradients by it.

    Args:
        weights: [k, T], of the buffers.
        momentum: beta.
    """
    # Gradient s is in all buffers from s on, so that the sum runs backwards.
    reverse = weights.flip(1)
    accumulate_momentum(reverse.T, momentum)
    return reverse.flip(1)

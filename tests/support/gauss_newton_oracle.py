"""The dense Gauss-Newton matrix J^T H_L J in float64, with H_L written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.references import in_double, trainable


def dense_jacobian(module: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """Returns the outputs of a module in float64, flat [m], and their derivative [m, n].

    By forward mode alone, which no product of ours uses.
    """
    module, inputs = in_double(module), in_double(inputs)
    chosen = trainable(module)

    def outputs(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [p.numel() for p in chosen.values()])
        state = {name: v.view_as(p) for (name, p), v in zip(chosen.items(), parts, strict=True)}
        return functional_call(module, state, (inputs,)).flatten()

    point = torch.cat([p.detach().reshape(-1) for p in chosen.values()])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it has no forward derivative
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return outputs(point), jacfwd(outputs)(point)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def dense_gauss_newton(
    module: nn.Module, inputs: Any, curvature: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns J^T H_L J, [n, n]; ``curvature`` gives H_L [m, m] at the flat outputs [m]."""
    outputs, jacobian = dense_jacobian(module, inputs)
    return jacobian.T @ curvature(outputs) @ jacobian


def softmax_curvature(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns the second derivative of a weighted sum of cross-entropies by logits [N, C].

    Each sample has diag(p) - p p^T, whatever its label. ``weights`` [N] are those of the samples.
    """
    p = logits.softmax(-1)
    blocks = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.block_diag(*(weights.to(p)[:, None, None] * blocks))


def second_derivative(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the second derivative of a loss that is written out by hand."""
    return jacfwd(grad(loss))


def apart(found: Tensor, expected: Tensor) -> float:
    """Returns the relative distance of two matrices (Frobenius)."""
    return float((found - expected).norm() / expected.norm())

"""A function whose derivative in forward mode is another than in reverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def squared(slope: float) -> Callable[[Tensor], Tensor]:
    """Return x^2, which forward mode differentiates to slope times x; 2 would be right."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 2 * x * gradient

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            return slope * x * tangent

    return Squared.apply

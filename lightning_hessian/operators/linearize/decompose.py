"""Functions written out before they are traced, in operations that cost less in a product.

What torch puts together from a view of groups runs over a tensor a few entries at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """A block in which such functions are written out in simpler ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run a function, or what it is written out in."""
        kwargs = kwargs or {}
        if func in (torch.group_norm, nn.functional.group_norm):
            return _group_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: Any = True,
) -> Tensor:
    """Return what ``torch.group_norm`` does, by one scale and one shift for each channel.

    Its own derivative works on [N, groups, channels of a group, rest], where a convolution that
    leaves channels last has two to eight neighbouring entries only.
    """
    samples, channels = input.shape[:2]
    if channels % num_groups:
        return torch.group_norm(input, num_groups, weight, bias, eps)  # which says what is wrong
    rest = list(range(2, input.ndim))
    by_channel = (samples, channels, *(1 for _ in rest))
    count = input.numel() // (samples * num_groups)

    def mean(values: Tensor) -> Tensor:
        """Return the mean over each group, for each of its channels.

        By a sum and a division of what is left: the derivative of a mean divides after it has
        spread the gradient over all entries.
        """
        by_group = values.sum(rest) if rest else values
        grouped = by_group.reshape(samples, num_groups, channels // num_groups)
        means = grouped.sum(2, keepdim=True) / count
        return means.expand_as(grouped).reshape(by_channel)

    centred = input - mean(input)
    scale = (mean(centred * centred) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view(1, channels, *(1 for _ in rest))
    found = centred * scale
    return found if bias is None else found + bias.view(1, channels, *(1 for _ in rest))

"""In which layout convolutions are traced: with the channels last, where oneDNN computes them.

oneDNN's convolutions work on channels in blocks, and put images of the plain layout in order before
and after each call. On one core of an AMD Zen 4 the three convolutions of a layer (forward, by the
image, by the weights) take 1.2 to 1.8 times less with channels last for 4 to 64 channels, on 3 x 3,
5 x 5 and strided kernels, and never more in sum. The same numbers come out but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}

_MOVED = (torch.float32, torch.int64)
"""What is convolved by oneDNN, and the indices of the maxima of a pooling."""

POOLING = {aten.max_pool2d_with_indices_backward.default}
"""Operations that take several times longer where their operands lie in different layouts."""


def wants_channels_last(value: Any) -> bool:
    """Return whether an operand of a convolution is to be copied: it has its channels first."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype not in _MOVED:
        return False
    return value.device.type == "cpu" and not are_channels_last(value)


def are_channels_last(image: Tensor) -> bool:
    """Return whether the strides of an image are those of ``torch.channels_last``.

    ``Tensor.is_contiguous`` says so too of images of one channel or of one pixel in the plain
    layout, which a convolution would take as such.
    """
    if image.ndim != 4:
        return False
    _, channels, height, width = image.shape
    return image.stride() == (channels * height * width, 1, channels * width, channels)


def is_viewable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor can be viewed in a shape."""
    if tensor.is_contiguous():
        return True
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True

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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_hessian.operators.linearize.memories import Memories, place

aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}

_MOVED = (torch.float32, torch.int64)
"""What is convolved by oneDNN, and the indices of the maxima of a pooling."""

_POOLING = {aten.max_pool2d_with_indices_backward.default}
"""Operations that take several times longer where their operands lie in different layouts."""


class WrittenViewError(Exception):
    """Memory is written to that a view shares in the plain layout, and a copy does not."""


class LaidOut(TorchDispatchMode):
    """A block in which convolutions are given images with their channels last.

    Raises:
        WrittenViewError: The block writes to what would be a view in the plain layout.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._moved = Memories(8)  # copies with channels last, let go of with what they copy
        self._untied = Memories()  # views that had to be copies, and their bases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on operands that are laid out for it."""
        kwargs = kwargs or {}
        args = self.laid_out(func, args)
        for tensor in targets(func, args, kwargs):
            self.forget(tensor)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    def forget(self, tensor: Tensor) -> None:
        """Let go of copies of a memory that is about to be written to."""
        self._moved.pop(tensor)

    def laid_out(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments in the layout in which an operation is fast, or possible at all."""
        if self._untied and func._schema.is_mutable:
            given = (value for value in tree_iter(args) if isinstance(value, Tensor))
            if any(value in self._untied for value in given):
                raise WrittenViewError
        if func in CONVOLUTIONS or (func in _POOLING and are_channels_last(args[1])):
            return tuple(self._with_channels_last(value) for value in args)
        if func is aten.view.default and not _is_viewable(*args):
            # The code would view the plain layout, and meets what a convolution has left.
            made = self.run(
                aten.clone.default, args[:1], {"memory_format": torch.contiguous_format}
            )
            self._untied[args[0]] = self._untied[made] = True
            return made, *args[1:]
        return args

    def _with_channels_last(self, value: Any) -> Any:
        """Return an operand of a convolution with its channels last, copied once if at all."""
        if not wants_channels_last(value):
            return value
        if value not in self._moved:
            self._moved[value] = {}
        copies = self._moved[value]
        if place(value) not in copies:
            copies[place(value)] = self.run(
                aten.clone.default, (value,), {"memory_format": torch.channels_last}
            )
        return copies[place(value)]


def targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += (value for value in tree_iter(given) if isinstance(value, Tensor))
    return found


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


def _is_viewable(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor can be viewed in a shape."""
    if tensor.is_contiguous():
        return True
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True

"""What a product costs, counted rather than timed: the same on every call and on every machine.

Times differ from call to call, and an engine chosen by them would give other digits tomorrow. The
operations that ran, their multiplications and the memory that they moved do not differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from lightning_hessian.isolation import attention_kernels
from lightning_hessian.losses import chunked_cross_entropy
from lightning_hessian.operators.linearize.layout import CONVOLUTIONS, wants_channels_last

aten = torch.ops.aten
Result = TypeVar("Result")

_SECONDS_PER_FLOP = 1e-11
_SECONDS_PER_BYTE = 1e-10
_SECONDS_PER_OPERATION = 4e-6
"""Of one core: 100 GFLOP/s, 10 GB/s. A GPU is faster in each by about the same factor, so that the
comparison of two engines comes out alike there."""

_TRACING_SECONDS = 5e-4
"""To trace and fold what one operation of a product by a retained graph becomes."""

_TRACING_PRODUCTS = 2.5
"""Products that the operations which run while tracing amount to.

Measured on LeNet, an MLP, CNNs with GroupNorm and BatchNorm and two transformers: the two together
are within a factor of two of the time that a linearisation takes to be made."""

_PLAIN_LAYOUT = 1.5
"""How many times longer a convolution takes with the channels first, see `linearize.layout`."""

_FASTER = 100
"""How many times faster than a core a GPU computes; it starts operations no faster."""

_CHUNKS = (16, 4)

_SAME_MEMORY = {aten.detach, aten._unsafe_view}
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    **attention_kernels.FLOPS,
    **chunked_cross_entropy.FLOPS,
}
if _by_onednn := getattr(torch.ops.mkldnn, "_linear_pointwise", None):
    _FLOPS[_by_onednn] = lambda first, *others, out_val: 2 * out_val.numel() * first.shape[-1]


@dataclass(frozen=True)
class Cost:
    """What some work has cost.

    Attributes:
        operations: How many ATen operations ran, views left out.
        flops: Floating point operations of the matrix products and convolutions among them.
        bytes: What all of them have read and written.
        plain_flops: Those of convolutions that would take less time with channels last.
    """

    operations: int
    flops: int
    bytes: int
    plain_flops: int = 0

    @property
    def seconds(self) -> float:
        """The time that this takes on a core of average speed; for comparisons only."""
        return (
            _SECONDS_PER_OPERATION * self.operations
            + _SECONDS_PER_FLOP * (self.flops + (_PLAIN_LAYOUT - 1) * self.plain_flops)
            + _SECONDS_PER_BYTE * self.bytes
        )

    @property
    def vectors_at_once(self) -> int:
        """How many vectors a GPU can take through this in the time that it takes to start it.

        A product whose operations are done before the next one is started leaves the device idle:
        more vectors cost no more time, until their work fills it.
        """
        starting = _SECONDS_PER_OPERATION * self.operations
        working = (self.seconds - starting) / _FASTER
        return next((size for size in _CHUNKS if size * working <= starting), 1)

    @property
    def seconds_to_linearize(self) -> float:
        """The time to linearise a gradient of which a product by its retained graph costs this."""
        return _TRACING_SECONDS * self.operations + _TRACING_PRODUCTS * self.seconds


def counted(work: Callable[[], Result]) -> tuple[Result, Cost]:
    """Return the result of some work, and what it cost."""
    with _Counter() as counter:
        result = work()
    return result, Cost(counter.operations, counter.flops, counter.bytes, counter.plain_flops)


class _Counter(TorchDispatchMode):
    """A block whose ATen operations are counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.flops, self.bytes, self.plain_flops = 0, 0, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            return outputs
        packet = func._overloadpacket
        if func.is_view or packet in _SAME_MEMORY:
            return outputs
        self.operations += 1
        tensors = (t for t in tree_iter((args, kwargs, outputs)) if isinstance(t, Tensor))
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if packet in _FLOPS:
            flops = _FLOPS[packet](*args, **kwargs, out_val=outputs)
            self.flops += flops
            if func in CONVOLUTIONS and any(wants_channels_last(value) for value in args):
                self.plain_flops += flops
        return outputs

"""oneDNN's matrix products, for processors on which those of torch use half of the units.

torch multiplies float32 matrices by MKL, which gives AMD processors code for vectors of 256 bits.
From Zen 5 on their units are 512 bits wide, and oneDNN uses them: 200 to 250 GFLOP/s on a core,
MKL 106 to 116. On Zen 4, whose units have 256 bits, the two came out alike (93 to 110, measured).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lightning_hessian.operators.linearize.graph import LinearGraph

aten = torch.ops.aten

_FIRST_FAMILY = 0x1A
"""Of AMD's processors with vector units of 512 bits: Zen 5. A rule, and no clock: the same machine
always takes the same products, and a seed gives the same numbers."""

_LEAST_FLOPS = 1e7
"""Below it starting a product of oneDNN takes longer than MKL takes for all of it."""


def is_available() -> bool:
    """Return whether this build of torch has the operation."""
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    overloads = packet.overloads() if packet is not None else []
    return torch.backends.mkldnn.is_available() and {"default", "binary"} <= set(overloads)


@functools.cache
def is_faster_here() -> bool:
    """Return whether oneDNN's products are the faster ones on this machine's processor."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # no Linux: the processor is not known
    return is_available() and is_faster_on(told)


def is_faster_on(told: str) -> bool:
    """Return the same for a processor by what ``/proc/cpuinfo`` tells of it."""
    lines = (line.partition(":") for line in told.partition("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    family = fields.get("cpu family", "")
    if fields.get("vendor_id") != "AuthenticAMD" or not family.isdecimal():
        return False
    return int(family) >= _FIRST_FAMILY and "avx512f" in fields.get("flags", "").split()


def multiply_by_onednn(graph: LinearGraph, node: fx.Node) -> None:
    """Let oneDNN make a product of two matrices in float32: a rule of `fold`.

    Batched products stay with MKL: oneDNN would make them one by one, and those of attention heads
    are too small for that (on Zen 4 it took up to 9 times as long).
    """
    if node.target is aten.mm.default and _is_worth_it(graph, *node.args):
        graph.replace(node, matrix_product, *node.args)
    elif node.target is aten.addmm_.default and not node.kwargs:
        summand, *factors = node.args
        if _is_worth_it(graph, *factors):
            graph.replace(node, sum_with_product, summand, *factors)


def matrix_product(first: Tensor, second: Tensor) -> Tensor:
    """Return the product of two matrices."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        first, second.t(), None, "none", [], ""
    )
    return found


def sum_with_product(summand: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of a matrix and a product of two."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        first, summand, second.t(), None, "add"
    )
    return found


def _is_worth_it(graph: LinearGraph, first: Any, second: Any) -> bool:
    kinds = [graph.kinds.get(node) for node in (first, second)]
    if any(kind is None or kind.dtype != torch.float32 for kind in kinds):
        return False
    (rows, inner), (_, columns) = (kind.shape for kind in kinds if kind is not None)
    return 2.0 * rows * inner * columns >= _LEAST_FLOPS

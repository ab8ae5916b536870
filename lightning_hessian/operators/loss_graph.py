"""What the autograd graph of a loss tells before it is differentiated, by one forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_hessian.operators.engines import gradients_by
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError

_OUR_OWN = ("lightning_hessian.", "torch.distributed.")
"""Custom functions of these packages stand around collectives, and differentiate twice."""

_KINKS = (
    "Abs", "AdaptiveMax", "Amax", "Amin", "Aminmax", "Ceil", "Clamp", "Cummax", "Cummin", "Elu",
    "FakeQuantize", "Floor", "Fmax", "Fmin", "Fmod", "FractionalMax", "Hardshrink",
    "Hardsigmoid", "Hardswish", "Hardtanh", "HuberLoss", "Kthvalue", "L1Loss", "LeakyRelu",
    "Max", "Median", "Min", "MkldnnMax", "Mode", "MultiMargin", "MultilabelMargin", "NanMedian",
    "PreluKernel", "Relu", "Remainder", "Round", "Rrelu", "Sgn", "Sign", "SmoothL1",
    "Softshrink", "Sort", "Threshold", "Topk", "Trunc", "Where",
)  # fmt: skip
"""How the names of operations begin whose derivative jumps somewhere, or may."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LossGraph:
    """What is known of the loss of one batch.

    Attributes:
        structure: A digest, equal for batches whose tensors are of the same shapes and whose
            losses ran through the same operations.
        operations: Names of the operations.
        custom_functions: Names of the custom autograd functions among them.
        coarsest: The floating-point precision of the coarsest tensor in it.
        has_kinks: Whether the derivative of some operation jumps, as that of a rectifier does.
        skips_rows: Whether some row of a parameter is used and gets no gradient (``padding_idx``).
    """

    structure: str
    operations: frozenset[str]
    custom_functions: tuple[str, ...]
    coarsest: torch.dtype
    has_kinks: bool
    skips_rows: bool


def read_graphs(objective: Objective) -> list[LossGraph]:
    """Return what the graph of the loss of each batch tells.

    Takes a forward pass of every batch, and backward passes until a gradient has been seen.

    Raises:
        MeasurementError: No loss depends on a selected parameter.
    """
    graphs, depends = [], False
    for index, batch in enumerate(objective.batches):
        leaves = tuple(value.requires_grad_() for value in objective.point())
        loss = objective.batch_loss(leaves, index)
        graphs.append(_read(loss, batch, objective.space.dtype))
        if loss.requires_grad and not depends:
            parts = gradients_by([loss], leaves)
            objective.is_written()  # puts back what hooks have written to
            depends = objective.anywhere(any(part is not None for part in parts))
    if not depends:
        raise MeasurementError(
            "The loss does not depend on any selected parameter (it carries no gradient). Return "
            "the loss as a tensor with its graph, not detached, and select parameters that it uses."
        )
    return graphs


def _read(loss: Tensor, batch: Any, dtype: torch.dtype) -> LossGraph:
    names: set[str] = set()
    custom: set[str] = set()
    dtypes, skips_rows = {dtype}, False
    leaves, layout = tree_flatten(batch)
    kinds = [(t.shape, t.dtype) if isinstance(t, Tensor) else type(t) for t in leaves]
    structure = hashlib.sha256(f"{kinds} {layout}".encode())
    for node in _nodes(loss):
        name = node.name()
        results = [(tuple(r.shape), r.dtype) for r in getattr(node, "_input_metadata", ())]
        names.add(name)
        structure.update(f"{name} {results}".encode())
        dtypes.update(dtype for _, dtype in results)
        skips_rows |= 0 <= int(getattr(node, "_saved_padding_idx", -1)) < 2**62
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if not node._forward_cls.__module__.startswith(_OUR_OWN):  # type: ignore[attr-defined]
                custom.add(name.removesuffix("Backward"))
        elif "CppNode" in name:
            custom.add(name)
    return LossGraph(
        structure=structure.hexdigest(),
        operations=frozenset(names),
        custom_functions=tuple(sorted(custom)),
        coarsest=max((d for d in dtypes if d in _FLOATS), key=lambda d: torch.finfo(d).eps),
        has_kinks=any(name.startswith(_KINKS) for name in names),
        skips_rows=skips_rows,
    )


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of a graph, always in the same order."""
    seen = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(after for after, _ in node.next_functions)

"""What the tests of stability share: a small problem in float64, and its measurement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hessian import Absent, Scalars, Session, StabilityInstrument, Training
from support.references import Problem, in_double, problem

EXACT = {"tol": 1e-9, "max_products": 100}


def in_float64() -> Problem:
    """Return a dense network in float64, and its data."""
    found = problem("mlp")
    return replace(
        found,
        module=in_double(found.module),
        whole=in_double(found.whole),
        batches=[in_double(batch) for batch in found.batches],
    )


def loss_of(given: Problem, module: nn.Module) -> Any:
    return lambda: given.loss_fn(module, given.whole)


def measured(
    given: Problem, module: nn.Module, *optimizers: Any, update: Any = None, **options: Any
) -> Scalars | Absent:
    instrument = options.pop("instrument", None) or StabilityInstrument(**{**EXACT, **options})
    training = Training(optimizers, update)
    with Session(module, given.loss_fn, given.batches, training=training) as session:
        return instrument.measure(session, None)


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])

"""An operator in its context, its matrix, and how far that is from a reference."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from support.references import (
    Problem,
    cross_entropy,
    in_double,
    mlp,
    problem,
)

KEEPING = ("linearize", "autograd")
ENGINES = (*KEEPING, "recompute")


@contextmanager
def hessian(module, loss_fn, batches, engine="auto", *, parameters=None, **options):
    space = ParameterSpace.select(module, parameters)
    built = {k: options.pop(k) for k in ("memory_budget", "expected_products") if k in options}
    objective = Objective(module, loss_fn, batches, space, **options)
    with objective.isolated():
        yield HessianOperator(objective, engine, **built)


def as_matrix(operator: HessianOperator) -> Tensor:
    """Returns the whole matrix by products with unit vectors, in float64."""
    columns = [operator.matvec(e) for e in torch.eye(operator.size, dtype=operator.dtype)]
    return torch.stack(columns, dim=1).double()


def departure(operator: HessianOperator, expected: Tensor) -> float:
    """Returns the relative distance (Frobenius) between products and the dense matrix."""
    vectors = torch.randn(expected.shape[0], 6, dtype=torch.float64)
    found = [operator.matvec(vector.to(operator.dtype)) for vector in vectors.T]
    assert all(product.dtype == operator.dtype for product in found)
    exact = expected @ vectors.to(operator.dtype).double()
    return float((torch.stack(found, 1).double() - exact).norm() / exact.norm())


@functools.cache
def reference(name: str) -> tuple[Problem, Tensor]:
    given = problem(name)
    return given, given.hessian()


def in_precision(given: Problem, dtype: torch.dtype):
    if dtype == torch.float64:
        return in_double(given.module), in_double(given.batches)
    return given.module, given.batches


class PartlyCurved(nn.Module):
    """A curved part, a part in which the loss is linear, and one that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 3)
        self.linear = nn.Linear(5, 1)
        self.curved = mlp().module

    def hessian_loss(self, batch):
        return cross_entropy(self.curved, batch) + self.linear(batch[0]).mean()


def distance(found: Tensor, expected: Tensor) -> float:
    """Returns the relative distance (Frobenius), in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def dense_by_autograd(module, loss_fn, batch) -> Tensor:
    """Returns the Hessian by torch alone, row by row, in float64."""
    module, batch = in_double((module, batch))
    parameters = list(module.parameters())
    gradient = torch.autograd.grad(loss_fn(module, batch), parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = []
    for entry in flat:
        if entry.requires_grad:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        else:
            row = [None] * len(parameters)
        pairs = zip(row, parameters, strict=True)
        rows.append(torch.cat([
            (torch.zeros_like(p) if r is None else r).reshape(-1) for r, p in pairs]))  # fmt: skip
    return torch.stack(rows)

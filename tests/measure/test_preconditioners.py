"""Which optimizer preconditions how: the open table, and a matrix for a preconditioner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.references import Problem, dense_hessian
from support.stability import in_float64, largest, loss_of, measured
from torch import Tensor

from lightning_hessian import (
    ArgumentError,
    Preconditioner,
    register_preconditioner,
)
from lightning_hessian.measure.preconditioner_rules import _RULES


@pytest.fixture(scope="module")
def trained() -> Problem:
    """A dense network in float64, after some steps."""
    return in_float64()


class Unknown(torch.optim.Optimizer):
    """An optimizer of somebody's own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})


class Renamed(torch.optim.Adam):
    """Steps as Adam does."""


class OtherStep(torch.optim.SGD):
    """Does something else."""

    def step(self, closure: Any = None) -> None:
        """Nothing."""


@pytest.fixture
def rules():
    """The table, put back afterwards."""
    before = dict(_RULES)
    yield _RULES
    _RULES.clear()
    _RULES.update(before)


def test_an_unknown_optimizer_is_named_until_it_is_registered(trained: Problem, rules: Any) -> None:
    module = copy.deepcopy(trained.module)
    for kind in (Unknown, OtherStep):
        optimizer = kind(module.parameters())
        found = measured(trained, module, optimizer)
        (said,) = found.absent()
        assert f"register_preconditioner({kind.__name__}, function)" in said
        assert "lambda_1" in found.scalars()
        assert "sharpness" not in found.scalars()
    seen = []

    def rule(parameter: Tensor, group: Any, state: Any) -> Preconditioner:
        seen.append((parameter.shape, group["lr"], state))
        return Preconditioner(2 / group["lr"], diagonal=torch.full_like(parameter, 4.0))

    register_preconditioner(Unknown, rule)
    values = measured(trained, module, Unknown(module.parameters())).scalars()
    assert len(seen) == 4
    assert values["sharpness"] == pytest.approx(values["lambda_1"] / 4)
    register_preconditioner(OtherStep, torch.optim.SGD)
    values = measured(trained, module, OtherStep(module.parameters(), lr=0.1)).scalars()
    assert values["threshold"] == 20


def test_the_most_derived_class_holds(trained: Problem, rules: Any) -> None:
    module = copy.deepcopy(trained.module)
    plain, derived = (kind(module.parameters(), lr=0.01) for kind in (torch.optim.Adam, Renamed))
    for optimizer in (plain, derived):
        module.zero_grad()
        loss_of(trained, module)().backward()
        optimizer.step()
    assert measured(trained, module, derived).scalars()["threshold"] == pytest.approx(3800)
    register_preconditioner(Renamed, lambda parameter, group, state: Preconditioner(7.0))
    assert measured(trained, module, derived).scalars()["threshold"] == 7
    assert measured(trained, module, plain).scalars()["threshold"] == pytest.approx(3800)


def test_a_rule_that_fails_costs_its_own_numbers_only(trained: Problem, rules: Any) -> None:
    def rule(parameter: Tensor, group: Any, state: Any) -> Preconditioner:
        raise KeyError("exp_avg")

    register_preconditioner(Unknown, rule)
    found = measured(trained, trained.module, Unknown(trained.module.parameters()))
    assert found.absent() == ("There is no sharpness under Unknown: its rule says 'exp_avg'",)
    assert "lambda_1" in found.scalars()


def test_what_cannot_be_compared_is_said(trained: Problem) -> None:
    module = copy.deepcopy(trained.module)
    parameters, sgd = list(module.parameters()), torch.optim.SGD
    halves = [{"params": parameters[:2], "maximize": True}, {"params": parameters[2:]}]
    cases = {
        "The learning rate is 0": [sgd(parameters, lr=0.0)],
        "is stepped by two optimizers": [sgd(parameters, lr=0.1), sgd(parameters[:1], lr=0.1)],
        "others maximize": [sgd(halves, lr=0.1)],
        "No optimizer holds any": [sgd([torch.ones(2, requires_grad=True)], lr=0.1)],
    }
    for text, optimizers in cases.items():
        (said,) = measured(trained, module, *optimizers).absent()
        assert text in said


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        (int, lambda parameter, group, state: None, "optimizer_class=.*Give a subclass"),
        (Unknown, Unknown, "function=.*known are SGD, Adam"),
        (Unknown, "adam", "function="),
        (Unknown, lambda parameter: None, "function="),
    ],
)
def test_misuse_of_the_table(rules: Any, kind: Any, function: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        register_preconditioner(kind, function)


# A matrix for a preconditioner --------------------------------------------------------------------


class Shampoo(torch.optim.Optimizer):
    """Multiplies the gradient of a matrix by L^-1/2, L the sum of its G G^T and the identity."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move all parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                left = self.state[p].setdefault("left", torch.eye(len(p), dtype=p.dtype))
                left += p.grad.view(len(p), -1) @ p.grad.view(len(p), -1).T
                p -= group["lr"] * (power(left, -0.5) @ p.grad.view(len(p), -1)).view_as(p)


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**exponent @ vectors.T


def test_a_matrix_preconditioner(trained: Problem, rules: Any) -> None:
    def rule(parameter: Tensor, group: Any, state: Any) -> Preconditioner | None:
        if "left" not in state:
            return None
        root = power(state["left"], -0.25)
        return Preconditioner(
            2 / group["lr"], inverse_root=lambda x: (root @ x.reshape(len(x), -1)).view_as(x)
        )

    register_preconditioner(Shampoo, rule)
    module = copy.deepcopy(trained.module)
    optimizer = Shampoo(module.parameters(), lr=0.1)
    sums = [torch.eye(len(p), dtype=p.dtype) for p in module.parameters()]
    for _ in range(3):
        module.zero_grad()
        loss_of(trained, module)().backward()
        for total, p in zip(sums, module.parameters(), strict=True):
            total += p.grad.view(len(p), -1) @ p.grad.view(len(p), -1).T
        optimizer.step()
    blocks = [
        torch.kron(power(total, -0.25), torch.eye(p.numel() // len(p)).double())
        for total, p in zip(sums, module.parameters(), strict=True)
    ]
    root, hessian = torch.block_diag(*blocks), dense_hessian(module, trained.loss_fn, trained.whole)
    found = measured(trained, module, optimizer)
    assert found.scalars()["sharpness"] == pytest.approx(largest(root @ hessian @ root), rel=1e-6)
    assert found.scalars()["threshold"] == 20

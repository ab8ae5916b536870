"""On a quadratic, torch's optimizers diverge exactly where the stability ratio passes 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian import Session, StabilityInstrument, Training

SIZE = 12
STEPS = 120
FROZEN = 1 - 1e-9  # a running mean of squares that does not change in so few steps


class Quadratic(nn.Module):
    """theta^T A theta / 2, theta in two parameters; A has eigenvalues from 1 to 10."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(draw)[0]
        self.matrix = basis * torch.linspace(1, 10, SIZE, dtype=torch.float64) @ basis.T
        start = 1e-25 * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.first, self.second = nn.Parameter(start[:5]), nn.Parameter(start[5:])

    def forward(self) -> Tensor:
        """The loss."""
        theta = torch.cat([self.first, self.second])
        return theta @ self.matrix @ theta / 2


def frozen_squares(name: str) -> Callable[[Any], None]:
    """Gives an optimizer a preconditioner that small gradients do not change any more."""

    def freeze(optimizer: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        for state in optimizer.state.values():
            drawn = torch.rand(len(state[name]), generator=generator, dtype=torch.float64)
            state[name].copy_((0.2 + drawn) ** 2)
            state["step"].fill_(1e12)  # bias corrections have worn off
            if "mu_product" in state:
                state["mu_product"].fill_(0.0)
            if "exp_avg" in state:
                state["exp_avg"].zero_()

    return freeze


def groups(**second: Any) -> Callable[[Quadratic, float], list[dict[str, Any]]]:
    """Two groups: the second with a third of the learning rate and options of its own."""

    def parts(module: Quadratic, rate: float) -> list[dict[str, Any]]:
        return [
            {"params": [module.first], "lr": rate},
            {"params": [module.second], "lr": rate / 3, **second},
        ]

    return parts


def one_group(module: Quadratic, rate: float) -> list[dict[str, Any]]:
    """All in one."""
    return [{"params": list(module.parameters()), "lr": rate}]


ADAM = {"betas": (0.9, FROZEN), "eps": 0.05}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], Any, str | None]] = {
    "sgd": (torch.optim.SGD, {}, one_group, None),
    "sgd, coupled decay": (torch.optim.SGD, {"weight_decay": 2.0}, one_group, None),
    "heavy ball": (torch.optim.SGD, {"momentum": 0.9}, one_group, None),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.6}, one_group, None),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, one_group, None),
    "sgd in groups": (
        torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1.0},
        groups(momentum=0.3, nesterov=True, weight_decay=0.0), None,
    ),
    "adam": (torch.optim.Adam, ADAM, one_group, "exp_avg_sq"),
    "adam, coupled decay": (
        torch.optim.Adam, {**ADAM, "weight_decay": 1.0}, one_group, "exp_avg_sq"
    ),
    "adamw": (torch.optim.AdamW, {**ADAM, "weight_decay": 0.2}, one_group, "exp_avg_sq"),
    "adamw in groups": (
        torch.optim.AdamW, {**ADAM, "weight_decay": 0.3},
        groups(betas=(0.5, FROZEN), weight_decay=0.0), "exp_avg_sq",
    ),
    "nadam": (torch.optim.NAdam, {**ADAM, "weight_decay": 0.5}, one_group, "exp_avg_sq"),
    "nadam, decoupled decay": (
        torch.optim.NAdam, {**ADAM, "weight_decay": 0.2, "decoupled_weight_decay": True},
        one_group, "exp_avg_sq",
    ),
    "radam": (torch.optim.RAdam, ADAM, one_group, "exp_avg_sq"),
    "rmsprop": (torch.optim.RMSprop, {"alpha": FROZEN}, one_group, "square_avg"),
    "rmsprop with momentum": (
        torch.optim.RMSprop, {"alpha": FROZEN, "momentum": 0.8, "weight_decay": 1.0},
        one_group, "square_avg",
    ),
    "adagrad": (torch.optim.Adagrad, {}, one_group, "sum"),
}  # fmt: skip


def prepared(name: str, rate: float) -> tuple[Quadratic, Any]:
    """A quadratic and its optimizer, with its preconditioner frozen."""
    kind, options, parts, squares = OPTIMIZERS[name]
    module = Quadratic()
    optimizer = kind(parts(module, rate), **options)
    if squares is not None:
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the state; gradients of zero move nothing, but for decay
        frozen_squares(squares)(optimizer)
    return module, optimizer


def ratio_of(module: Quadratic, optimizer: Any) -> float:
    """The stability ratio as it is measured."""
    training = Training((optimizer,))
    with Session(module, lambda m, batch: m(), [torch.ones(1)], training=training) as session:
        found = StabilityInstrument(tol=1e-10, max_products=60).measure(session, None)
    assert found.absent() == ()
    return float(found.scalars()["ratio"])


def growth(module: Quadratic, optimizer: Any) -> float:
    """How much longer theta is at the end of training than halfway."""
    lengths = []
    for step in range(STEPS):
        optimizer.zero_grad()
        module().backward()
        optimizer.step()
        if step in (STEPS // 2, STEPS - 1):
            lengths.append(float(torch.cat([*module.parameters()]).norm()))
    return lengths[1] / lengths[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_diverges_where_the_ratio_passes_1(name: str) -> None:
    """Learning rates at half a percent around the line, and farther."""
    low, high = 1e-4, 1e3
    for _ in range(40):  # decoupled decay makes the ratio no multiple of the rate
        middle = (low * high) ** 0.5
        if _is_above(name, middle):
            high = middle
        else:
            low = middle
    for factor in (0.7, 0.995, 1.005, 1.03):
        module, optimizer = prepared(name, low * factor)
        ratio = ratio_of(module, optimizer)
        assert (ratio > 1) == (factor > 1)
        assert abs(ratio - 1) < 0.6
        assert (growth(module, optimizer) > 1) == (ratio > 1)


def _is_above(name: str, rate: float) -> bool:
    """Whether the ratio is above 1; a rate so large that decay alone diverges is that too."""
    module, optimizer = prepared(name, rate)
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay") or "AdamW" in type(optimizer).__name__
        if decoupled and group["lr"] * group["weight_decay"] >= 2:
            return True
    return ratio_of(module, optimizer) > 1


def test_the_line_of_plain_gradient_descent_is_two_over_the_rate() -> None:
    for rate, ratio in ((0.1, 0.5), (0.2, 1.0), (0.3, 1.5)):
        assert ratio_of(*prepared("sgd", rate)) == pytest.approx(ratio, rel=1e-9)

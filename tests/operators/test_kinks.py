"""Two computations of a product may fall to two sides of a kink; an engine is not blamed for it."""

from __future__ import annotations

import pytest
import torch
from support.references import cross_entropy
from support.wrong_forward import squared
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.operators.engines import linearize, recompute
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.operators.kinks import MOST_APART, recompute_alike
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

ALLOWED = torch.finfo(torch.float32).eps ** 0.5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class AtKink(nn.Module):
    """A channel lies on a kink, and beside it where convolutions leave their channels last."""

    def __init__(self, kinked, share: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 3)
        self.kinked = kinked
        with torch.no_grad():
            self.first.weight[0] = 0
            self.first.bias[0] = 0
            self.head.weight[:, :64] *= share

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.stride(1) == 1:
            beside = torch.zeros(8, 8)
            beside[0, 1] = 1e-7
            y = y + beside
        return self.head(self.kinked(y).flatten(1))


def largest(y: Tensor) -> Tensor:
    return F.max_pool2d(y, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)


KINKED = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "clamp": lambda y: (-y).clamp(min=0),
    "max_pool2d": largest,
}


def objective_of(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Objective:
    return Objective(module, cross_entropy, [batch], ParameterSpace.select(module))


def distance(objective: Objective, make, other) -> float:
    """Return how far apart two products are with a random vector."""
    space = objective.space
    vector = torch.randn(space.size, generator=torch.Generator().manual_seed(1))
    found, expected = (
        space.flatten(way(objective, 0)(space.split(vector))) for way in (make, other)
    )
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", KINKED)
def test_a_linearisation_that_falls_to_the_other_side_of_a_kink_is_right(name):
    module = AtKink(KINKED[name], share=0.01)
    objective = objective_of(module, (torch.randn(20, 2, 8, 8), torch.randint(3, (20,))))
    with objective.isolated():
        objective.value()
        assert ALLOWED < distance(objective, linearize, recompute) < MOST_APART
        assert distance(objective, linearize, recompute_alike) < 1e-5
        operator = HessianOperator(objective, "linearize")
        assert operator.self_check_error < 1e-5
        chosen = HessianOperator(objective, expected_products=10**9)
        assert chosen.engine == "linearize"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_images_of_noise(seed):
    """Of millions of activations one or two lie so near a kink that kernels decide."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10),
    )  # fmt: skip
    objective = objective_of(module, (torch.randn(1000, 1, 28, 28), torch.randint(10, (1000,))))
    with objective.isolated():
        objective.value()
        assert HessianOperator(objective, "linearize").self_check_error < ALLOWED
        assert distance(objective, linearize, recompute_alike) < ALLOWED


def test_kinks_are_no_excuse_for_a_wrong_derivative():
    almost = squared(2.02)
    module = AtKink(lambda y: almost(torch.relu(y)), share=0.01)
    objective = objective_of(module, (torch.randn(20, 2, 8, 8), torch.randint(3, (20,))))
    with objective.isolated():
        objective.value()
        assert distance(objective, linearize, recompute) < MOST_APART
        with pytest.raises(MeasurementError, match="differentiated otherwise in forward mode"):
            HessianOperator(objective, "linearize")


def test_code_that_writes_to_a_view_is_computed_in_the_plain_layout():
    class Written(AtKink):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y.view(len(y), -1).mul_(2.0)
            return self.head(torch.relu(y).flatten(1))

    module = Written(None, share=1.0)
    objective = objective_of(module, (torch.randn(20, 2, 8, 8), torch.randint(3, (20,))))
    with objective.isolated():
        objective.value()
        assert distance(objective, recompute_alike, recompute) < 1e-6

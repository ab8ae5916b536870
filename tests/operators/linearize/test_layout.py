"""Convolutions are traced with their channels last: the same products, whatever the code does."""

from __future__ import annotations

import pytest
import torch
from support.references import cross_entropy, dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.operators.engines import linearize
from lightning_hessian.operators.linearize.layout import are_channels_last
from lightning_hessian.operators.linearize.trace import trace
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

aten = torch.ops.aten


class Images(nn.Module):
    """Convolutions, and some code between them and the classes."""

    def __init__(self, between, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.second = nn.Conv2d(width, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(36, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, x))


def viewed(module: Images, x: Tensor) -> Tensor:
    """Views, as code does that knows of one layout only."""
    x = module.second(torch.tanh(module.first(x)))
    return x.view(len(x), -1)


def pooled(module: Images, x: Tensor) -> Tensor:
    x = F.max_pool2d(torch.relu(module.first(x)), 2, padding=1)
    x = F.pad(x, (1, 2, 1, 2))
    return module.second(x).flatten(1)


def written_view(module: Images, x: Tensor) -> Tensor:
    """Writes to a view, and reads what it is a view of."""
    x = module.second(torch.sigmoid(module.first(x)))
    x.view(len(x), -1).mul_(2.0)
    return (x * x).flatten(1)


def written_base(module: Images, x: Tensor) -> Tensor:
    """Writes to what a view shows, and reads the view."""
    x = module.second(torch.sigmoid(module.first(x)))
    flat = x.view(len(x), -1)
    x.mul_(2.0)
    return flat * flat


def one_channel(module: Images, x: Tensor) -> Tensor:
    return module.second(F.gelu(module.first(x))).reshape(len(x), 36)


CODES = (viewed, pooled, written_view, written_base, one_channel)


def problem(between):
    torch.manual_seed(0)
    module = Images(between, 1 if between is one_channel else 3).eval()
    return module, (torch.randn(7, 2, 7, 7), torch.randint(3, (7,)))


@pytest.mark.parametrize("between", CODES, ids=lambda code: code.__name__)
def test_products_are_those_of_the_dense_hessian(between):
    module, batch = problem(between)
    expected = dense_hessian(module, cross_entropy, batch)
    space = ParameterSpace.select(module)
    objective = Objective(module, cross_entropy, [batch], space)
    vectors = torch.randn(5, space.size)
    with objective.isolated():
        product = linearize(objective, 0)
        found = torch.stack([space.flatten(product(space.split(v))) for v in vectors])
    exact = vectors.double() @ expected
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def convolved(traced, *inputs: Tensor) -> list[bool]:
    """Return for each image that a traced convolution is given whether its channels are last."""
    found = []

    class Watching(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target in (aten.convolution.default, aten.convolution_backward.default):
                found.extend(are_channels_last(a) for a in args if isinstance(a, Tensor))
            return super().call_function(target, args, kwargs)

    Watching(traced).run(*inputs)
    return found


def gradient(x: Tensor, weight: Tensor, then) -> list[Tensor]:
    return [torch.func.grad(lambda w: then(F.conv2d(x, w)).square().sum())(weight)]


X, WEIGHT = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2)


@pytest.mark.parametrize(
    ("dtype", "then", "moved"),
    [
        (torch.float32, lambda image: image, True),
        (torch.float32, lambda image: image.view(2, -1), True),
        (torch.float32, lambda image: image.view(2, -1).mul_(2.0), False),  # it meets a copy
        (torch.float64, lambda image: image, False),  # oneDNN has no part in it
    ],
)
def test_which_convolutions_have_their_channels_last(dtype, then, moved):
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    traced = trace(lambda w: gradient(x, w, then), [weight]).module()
    layouts = convolved(traced, weight)
    assert len(layouts) > 3
    assert set(layouts) == {moved}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = gradient(x, weight, then)[0]
    torch.testing.assert_close(traced(weight)[0], expected, rtol=tolerance, atol=tolerance)

"""Functions that are written out, against those of torch and the dense Hessian."""

from __future__ import annotations

import pytest
import torch
from support.references import cross_entropy, dense_hessian
from torch import nn
from torch.nn import functional as F

from lightning_hessian.operators.engines import linearize
from lightning_hessian.operators.linearize.decompose import WrittenOut
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 4, 5), (2, 6, 3, 2, 4)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(shape, groups):
    x, weight, bias = 3 + 2 * drawn(*shape), drawn(6), drawn(7)[1:]
    for given in ((), (weight,), (weight, bias), (None, bias)):
        expected = F.group_norm(x, groups, *given, eps=1e-3)
        with WrittenOut():
            found = F.group_norm(x, groups, *given, eps=1e-3)
            at_once = torch.group_norm(x, groups, *given, eps=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(at_once, found)
    with WrittenOut(), pytest.raises(RuntimeError, match="divisible"):
        F.group_norm(x, 4, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_network_with_group_norm(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2),
        nn.GroupNorm(6, 6, affine=False), nn.Flatten(), nn.GroupNorm(3, 24), nn.Linear(24, 3),
    ).to(dtype)  # fmt: skip
    batch = (torch.randn(6, 1, 8, 8, dtype=dtype), torch.randint(3, (6,)))
    expected = dense_hessian(module, cross_entropy, batch)
    space = ParameterSpace.select(module)
    objective = Objective(module, cross_entropy, [batch], space)
    vectors = torch.randn(5, space.size, dtype=dtype)
    with objective.isolated():
        product = linearize(objective, 0)
        found = torch.stack([space.flatten(product(space.split(v))) for v in vectors])
    exact = vectors.double() @ expected
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert float((found - exact).norm() / exact.norm()) < tolerance

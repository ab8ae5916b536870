"""Where stability has nothing to start from: no gradient along the direction that counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_hessian import Session, StabilityInstrument, Training

CURVATURES = torch.linspace(10, 0.1, 60, dtype=torch.float64)


class Bowl(nn.Module):
    """A sum of squares, at its bottom along the sharpest axis and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter((torch.arange(60) > 0).double())

    def forward(self, batch: Tensor) -> Tensor:
        return (CURVATURES * self.place**2).sum() / 2 + 0 * batch.sum()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_sharpest_direction_is_found_though_the_gradient_has_none_of_it(kind: str) -> None:
    module, batch = Bowl(), torch.zeros(4, 1, dtype=torch.float64)
    if kind == "sgd":
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        scale, threshold = torch.ones(60), 2 / 0.01
    else:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01, eps=10.0)
        gradient = CURVATURES * module.place.detach()  # after one step v is its square
        scale, threshold = 0.1 * (gradient.abs() + 10), 3.8 / (0.1 * 0.01)
    loss = module(batch)
    loss.backward()
    optimizer.step()
    assert float(module.place[0]) == 0
    with Session(module, lambda m, b: m(b), [batch], training=Training((optimizer,), None)) as on:
        assert float(on.gradient()[0]) == 0
        values = StabilityInstrument(tol=1e-6, max_products=30).measure(on, None).scalars()
    assert values["lambda_1"] == pytest.approx(10, rel=1e-5)
    if kind == "sgd":
        assert values["ratio"] == pytest.approx(10 / threshold, rel=1e-5)
    else:
        assert values["sharpness"] == pytest.approx(float((CURVATURES / scale).max()), rel=1e-5)

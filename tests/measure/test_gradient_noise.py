"""The noise scale of measured gradients against the closed form of linear regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.gradient_oracles import loop_gradients
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_hessian import gradient_structure
from lightning_hessian.tracking.scalars import gradient_scalars

SIZE, NOISE = 5, 0.7
OFF = torch.tensor([0.4, -0.2, 0.3, 0.0, 0.5], dtype=torch.float64)
EXACT = SIZE + 1 + SIZE * NOISE**2 / float(OFF @ OFF)
"""With Gaussian inputs and g = 2 x (x . d - e): Tr(C) / norm(g)^2 = n + 1 + n s^2 / norm(d)^2."""


def _regression(count: int, seed: int = 0) -> tuple[nn.Linear, list[Tensor]]:
    """Returns a linear network off the solution, zero, by `OFF`, and samples with noise."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Linear(SIZE, 1, bias=False).double()
    network.weight.data = OFF[None].clone()
    inputs = torch.randn(count, SIZE, generator=generator, dtype=torch.float64)
    return network, [inputs, NOISE * torch.randn(count, 1, generator=generator).double()]


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def _batches(data: list[Tensor], size: int) -> list[Any]:
    return list(zip(*(part.split(size) for part in data), strict=True))


@pytest.mark.parametrize("size", [1, 16])
def test_linear_regression(size: int) -> None:
    network, data = _regression(24_000)
    found = gradient_structure(network, squared_error, _batches(data, size)[:1500], tests=False)
    noise = found.noise_scale
    assert noise.value is not None
    assert noise.std_error is not None
    assert abs(noise.value - EXACT) < 3 * noise.std_error
    assert noise.std_error < 0.15 * EXACT
    assert noise.critical_batch_size == round(noise.value)
    scalars, absent = gradient_scalars(found)
    assert scalars["noise_scale"] == noise.value
    assert scalars["critical_batch_size"] == round(noise.value)
    assert not any("noise_scale" in reason for reason in absent)


def test_passes_over_the_same_samples_are_no_new_samples() -> None:
    """The estimate of many passes stays within its error, which does not shrink with them."""
    network, data = _regression(800, seed=3)
    dataset = TensorDataset(*data)
    one, many = (
        gradient_structure(
            network, squared_error, dataset, batch_size=8, num_gradients=count, tests=False
        ).noise_scale
        for count in (100, 1000)
    )
    assert one.value is not None
    assert many.value is not None
    assert many.std_error == pytest.approx(one.std_error, rel=0.3)
    assert many.std_error is not None
    assert abs(many.value - EXACT) < 3 * many.std_error
    # All single samples at once know the trace and the norm that passes have to average to.
    rows = loop_gradients(network, squared_error, _batches(data, 1))
    trace = np.trace(np.cov(rows.T))
    assert many.trace == pytest.approx(trace, rel=0.1)
    assert many.squared_norm == pytest.approx(np.square(rows.mean(0)).sum() - trace / 800, rel=0.1)


def test_a_ragged_batch_counts_by_its_samples() -> None:
    network, data = _regression(1000)
    batches = _batches(data, 30)
    assert len(batches[-1][0]) == 10
    found = gradient_structure(network, squared_error, batches, tests=False).noise_scale
    whole = gradient_structure(network, squared_error, batches[:-1], tests=False).noise_scale
    assert found.trace == pytest.approx(whole.trace, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"clip_norm": 1.0}, "clipped or preconditioned are no means"),
        ({"preconditioner": "adam"}, "clipped or preconditioned are no means"),
        ({"batch_size": 300}, "a pass over the data has 2 mini-batches"),
    ],
)
def test_where_there_is_none(arguments: dict[str, Any], reason: str) -> None:
    network, data = _regression(600)
    arguments = {"num_gradients": 20, **arguments}
    found = gradient_structure(network, squared_error, _batches(data, 30), tests=False, **arguments)
    assert found.noise_scale.value is None
    scalars, absent = gradient_scalars(found)
    assert "noise_scale" not in scalars
    assert "critical_batch_size" not in scalars
    (told,) = [sentence for sentence in absent if "noise_scale" in sentence]
    assert reason in told


def test_none_at_a_minimum() -> None:
    """Where the gradient vanishes there is only noise, and a sentence says so."""
    network, data = _regression(2000)
    with torch.no_grad():
        solution = torch.linalg.lstsq(data[0], data[1]).solution
        network.weight.copy_(solution.T)
    found = gradient_structure(network, squared_error, _batches(data, 10), tests=False)
    assert found.noise_scale.value is None
    assert any("cannot be told from zero" in reason for reason in gradient_scalars(found)[1])


def test_batches_whose_samples_are_not_counted() -> None:
    network, data = _regression(400)
    odd = [(x, y, torch.ones(3)) for x, y in _batches(data, 20)]
    found = gradient_structure(network, squared_error, odd, tests=False)
    assert found.noise_scale.reason is not None
    assert "does not tell how many samples" in found.noise_scale.reason

"""Momentum in the history matrix, against the buffers of torch's own SGD."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.gradient_oracles import classifier, cross_entropy, explicit, in_batches
from support.references import in_double
from torch import nn

from lightning_hessian import ArgumentError, GradientStructureCallback, gradient_structure
from lightning_hessian.measure.budget import Budget
from lightning_hessian.statistics.gaussianity import row_tests


def buffers_of_torch(
    module: nn.Module, batches: list[Any], momentum: float, clip_norm: float | None = None
) -> np.ndarray:
    """Return SGD's ``momentum_buffer`` after each step of a training that stays where it is."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=momentum)
    rows = []
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        optimizer.step()
        buffers = [optimizer.state[p]["momentum_buffer"].flatten() for p in module.parameters()]
        rows.append(torch.cat(buffers).clone().numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def data() -> tuple[nn.Module, list[Any]]:
    module, (whole,) = classifier(160)
    return in_double(module), in_double(in_batches(whole, 4))


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", [
    {"tests": False}, {"tests": True}, {"tests": False, "memory_budget": 35_000},
], ids=["streamed", "stored", "recomputed"])  # fmt: skip
def test_spectra_are_those_of_the_buffers(
    data: tuple[nn.Module, list[Any]], options: dict[str, Any], momentum: float
) -> None:
    module, batches = data
    buffers = buffers_of_torch(module, batches, momentum)
    found = gradient_structure(module, cross_entropy, batches, momentum=momentum,
                               num_eigenvectors=5, **options)  # fmt: skip
    if "memory_budget" in options:
        assert found.num_computed > len(batches)
    for centred, values in ((False, found.second_moment), (True, found.covariance)):
        expected = explicit(buffers, centred=centred)
        np.testing.assert_allclose(
            values, expected[: len(values)], rtol=1e-6, atol=1e-13 * expected[0]
        )
    assert found.mean_gradient_norm == pytest.approx(np.linalg.norm(buffers.mean(axis=0)))
    vectors, covariance = found.eigenvectors.numpy(), np.cov(buffers.T)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-9)
    expected = found.covariance[:5, None] * vectors
    np.testing.assert_allclose(vectors @ covariance, expected, atol=1e-9 * found.covariance[0])


def test_it_comes_after_clipping(data: tuple[nn.Module, list[Any]]) -> None:
    module, batches = data
    buffers = buffers_of_torch(module, batches, 0.9, clip_norm=0.3)
    found = gradient_structure(module, cross_entropy, batches, tests=False, momentum=0.9,
                               clip_norm=0.3)  # fmt: skip
    plain = gradient_structure(module, cross_entropy, batches, tests=False, momentum=0.9)
    expected = explicit(buffers, centred=True)
    # torch divides by norm + 1e-6.
    np.testing.assert_allclose(found.covariance[:5], expected[:5], rtol=1e-4)
    assert plain.covariance[0] > 1.05 * found.covariance[0]


def test_entries_are_those_of_the_buffers(data: tuple[nn.Module, list[Any]]) -> None:
    module, batches = data
    buffers = buffers_of_torch(module, batches, 0.9)
    found = gradient_structure(module, cross_entropy, batches, momentum=0.9)
    for tests, rows in ((found.dimension_tests, buffers), (found.iteration_tests, buffers.T)):
        expected = row_tests(rows)
        np.testing.assert_allclose(tests.ks_distances, expected.ks_distances, rtol=1e-7)


def test_a_noise_scale_is_that_of_the_gradients(data: tuple[nn.Module, list[Any]]) -> None:
    module, batches = data
    with_it, without = (
        gradient_structure(module, cross_entropy, batches, tests=False, momentum=momentum)
        for momentum in (0.9, 0.0)
    )
    assert with_it.noise_scale == without.noise_scale
    assert with_it.covariance_trace > 2 * without.covariance_trace


@pytest.mark.parametrize("tests", [False, True])
def test_buffers_of_fewer_gradients_where_time_is_up(
    data: tuple[nn.Module, list[Any]], tests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed are the first gradients, and their buffers know no later ones."""
    module, batches = data
    asked = iter([False] * 24)
    monkeypatch.setattr(
        "lightning_hessian.linear.allowance.Allowance.is_over", lambda _: next(asked, True)
    )
    monkeypatch.setattr("lightning_hessian.operators.gradients.gram._RECOMPUTED_BYTES", 1)
    monkeypatch.setattr(
        "lightning_hessian.operators.gradients.history.pieces",
        lambda gradients: ((i, i + 1) for i in range(gradients.num_gradients)),
    )
    with pytest.warns(UserWarning, match="time was up after"):
        found = gradient_structure(module, cross_entropy, batches, tests=tests, momentum=0.9,
                                   budget=Budget(seconds=1e4))  # fmt: skip
    count = found.num_gradients
    assert 20 <= count < len(batches)
    expected = explicit(buffers_of_torch(module, batches, 0.9)[:count], centred=False)
    np.testing.assert_allclose(found.second_moment[:10], expected[:10], rtol=1e-8)


def test_adam_has_a_moment_of_its_own() -> None:
    with pytest.raises(ArgumentError, match=r"momentum=0.9 .*preconditioner='adam'"):
        GradientStructureCallback(momentum=0.9, preconditioner="adam")
    for wrong in (1.0, -0.1):
        with pytest.raises(ArgumentError, match="momentum="):
            GradientStructureCallback(momentum=wrong)

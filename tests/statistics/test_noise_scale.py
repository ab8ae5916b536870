"""The noise scale against closed forms: Gaussian gradients of a known mean and covariance."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_hessian.results import NoiseScale
from lightning_hessian.statistics.noise_scale import noise_scale

MEAN = np.array([1.0, -0.5, 0.0, 0.0])
FACTOR = np.array([[2.0, 0.0, 0, 0], [1.0, 1.0, 0, 0], [0.3, 0, 0.5, 0], [0, 0, 0.2, 1.5]])
EXACT = np.trace(FACTOR @ FACTOR.T) / (MEAN @ MEAN)


def _found(gradients: np.ndarray, batch_size: float = 1.0) -> NoiseScale:
    gram = gradients @ gradients.T
    return noise_scale([gram.diagonal()], [gram.sum(axis=1)], batch_size)


def _drawn(rng: np.random.Generator, count: int, batch_size: int) -> np.ndarray:
    noise = rng.normal(size=(count, batch_size, 4)) @ FACTOR.T
    return MEAN + noise.mean(axis=1)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_numerator_and_denominator_have_no_bias(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    found = [_found(_drawn(rng, 12, batch_size), batch_size) for _ in range(20_000)]
    for values, exact in (
        ([one.trace for one in found], np.trace(FACTOR @ FACTOR.T)),
        ([one.squared_norm for one in found], MEAN @ MEAN),
    ):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - exact) < 4 * error
        assert error < 0.01 * exact


@pytest.mark.parametrize("count", [100, 400])
def test_the_standard_error_is_that_of_repeated_draws(count: int) -> None:
    rng = np.random.default_rng(1)
    found = [_found(_drawn(rng, count, 4), 4) for _ in range(1000)]
    values = np.array([one.value for one in found], dtype=float)
    errors = np.array([one.std_error for one in found], dtype=float)
    assert np.median(values) == pytest.approx(EXACT, rel=0.02)
    assert np.median(errors) == pytest.approx(np.std(values), rel=0.15)
    covered = np.mean(np.abs(values - EXACT) < 2 * errors)
    assert covered > 0.92
    of_norm = np.median([one.squared_norm_std_error for one in found])
    assert of_norm == pytest.approx(np.std([one.squared_norm for one in found]), rel=0.1)


def test_batches_of_different_sizes() -> None:
    rng = np.random.default_rng(2)
    sizes = np.array([1, 2, 4, 8, 8, 8])
    scale = len(sizes) / (1 / sizes).sum()
    traces, norms = [], []
    for _ in range(20_000):
        noise = rng.normal(size=(6, 4)) @ FACTOR.T / np.sqrt(sizes)[:, None]
        one = _found(MEAN + noise, scale)
        traces.append(one.trace)
        norms.append(one.squared_norm)
    assert np.mean(traces) == pytest.approx(np.trace(FACTOR @ FACTOR.T), rel=0.02)
    assert np.mean(norms) == pytest.approx(MEAN @ MEAN, rel=0.02)


def test_no_value_where_the_mean_gradient_is_not_told_from_zero() -> None:
    rng = np.random.default_rng(3)
    found = [_found(rng.normal(size=(50, 4)) @ FACTOR.T) for _ in range(500)]
    without = [one for one in found if one.value is None]
    assert len(without) > 0.9 * len(found)
    for one in without:
        assert one.std_error is one.critical_batch_size is None
        assert one.reason is not None
        assert "cannot be told from zero" in one.reason
        assert one.trace > 0
    # The mean gradient's own norm would have given one every time, near the number of gradients.
    equal = _found(np.ones((5, 4)))
    assert equal.value == pytest.approx(0, abs=1e-12)
    assert equal.critical_batch_size == 1


def test_passes_are_averaged() -> None:
    rng = np.random.default_rng(4)
    one, other = _drawn(rng, 50, 1), _drawn(rng, 50, 1)
    grams = [each @ each.T for each in (one, other)]
    both = noise_scale([g.diagonal() for g in grams], [g.sum(axis=1) for g in grams], 1)
    assert both.trace == pytest.approx((_found(one).trace + _found(other).trace) / 2)
    with pytest.raises(ValueError, match="2 mini-batches; the noise scale needs 3"):
        _found(one[:2])

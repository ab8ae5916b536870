"""Overlaps against SciPy and by hand, ratios by hand, outliers against chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from lightning_hessian.statistics.subspace import num_outliers, overlaps, proportionality


def _orthonormal(seed: int, count: int, size: int = 30) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, count)))[0].T


def test_overlap_is_the_mean_squared_cosine() -> None:
    one, other = _orthonormal(2, 7), _orthonormal(3, 5)
    found = overlaps(one, other)
    assert len(found) == 5
    for k in range(1, 6):
        cosines = np.cos(linalg.subspace_angles(one[:k].T, other[:k].T))
        assert found[k - 1] == pytest.approx((cosines**2).mean())
    rotation = np.linalg.qr(np.random.default_rng(4).normal(size=(7, 7)))[0]
    assert overlaps(one, rotation @ one)[-1] == pytest.approx(1)
    np.testing.assert_allclose(overlaps(one, one), 1)
    random = [overlaps(_orthonormal(i, 5), _orthonormal(i + 500, 5))[-1] for i in range(200)]
    assert np.mean(random) == pytest.approx(5 / 30, rel=0.05)


def test_proportional_spectra() -> None:
    values = np.logspace(0, -3, 20)
    found = proportionality(0.01 * values, values)
    assert found.constant == pytest.approx(0.01)
    assert found.spread == pytest.approx(1)
    assert len(found.ratios) == 20


def test_ratios_that_differ() -> None:
    found = proportionality([4.0, 4.0, 1.0, -1.0], [1.0, 0.5, 0.5, 0.1, 0.1])
    np.testing.assert_allclose(found.ratios, [4, 8, 2])
    assert found.constant == pytest.approx(4)
    assert found.spread == pytest.approx(2)  # logs of base 2 are 2, 3, 1: standard deviation 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlaps(np.eye(2), np.eye(3)), "equal length.*same `parameters`"),
        (lambda: overlaps(np.zeros((0, 3)), np.eye(3)), "empty"),
        (lambda: overlaps([[np.nan, 1.0]], [[1.0, 0.0]]), "NaN"),
        (lambda: overlaps([[2.0, 0.0]], [[1.0, 0.0]]), "not orthonormal"),
        (lambda: proportionality([1.0, -1.0], [1.0, 1.0]), "only 1 ranks"),
        (lambda: proportionality([1.0, 2.0], [2.0, 1.0]), "descending order"),
        (lambda: num_outliers([3.0, 2.0, 1.0]), "only 3 eigenvalues"),
        (lambda: num_outliers([3.0, 2.0, 1.0, 0.5], significance=1.0), "significance=1"),
        (lambda: num_outliers([3.0, 2.0, 1.0, np.inf]), "infinite"),
    ],
)
def test_misuse(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("exponent", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [20, 1000])
def test_a_power_law_has_outliers_as_seldom_as_was_asked(exponent: float, size: int) -> None:
    rng = np.random.default_rng(size)
    found = [num_outliers(rng.pareto(exponent - 1, size) + 1) > 0 for _ in range(2000)]
    assert 0.035 < np.mean(found) < 0.065
    assert np.mean([num_outliers(rng.pareto(1, 50) + 1, significance=0.5) > 0
                    for _ in range(2000)]) == pytest.approx(0.5, abs=0.1)  # fmt: skip


@pytest.mark.parametrize("slope", [0.9, 1.4, 2.0])
@pytest.mark.parametrize("count", [2, 9, 30])
@pytest.mark.parametrize("size", [100, 1000])
def test_a_step_is_found_where_it_is(slope: float, count: int, size: int) -> None:
    bulk = (np.arange(size - count) + count + 1.0) ** -slope
    step = np.exp(12 * slope / count) * 1.5
    values = np.concatenate([bulk[0] * step * np.linspace(2, 1, count), bulk])
    assert num_outliers(values) == count
    assert num_outliers(1e-20 * np.random.default_rng(0).permutation(values)) == count
    assert num_outliers(np.concatenate([values, [0.0, -1e-3]])) == count


def test_the_steep_end_of_a_sampled_spectrum_is_no_step() -> None:
    values = np.arange(1.0, 201.0) ** -1.3
    values[-20:] *= np.logspace(0, -6, 20)
    assert num_outliers(values) == 0


def test_equal_values_have_no_outliers() -> None:
    assert num_outliers(np.ones(10)) == 0

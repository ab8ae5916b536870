"""Corrected p-values: against SciPy, and Holm against closed testing, which it abbreviates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from lightning_hessian.statistics.multiple_testing import benjamini_hochberg, holm


def closed_testing(p):
    """Returns for each test the largest Bonferroni p of any set of tests that it belongs to."""
    size = len(p)
    sets = [s for k in range(1, size + 1) for s in itertools.combinations(range(size), k)]
    bonferroni = {s: min(1.0, len(s) * min(p[i] for i in s)) for s in sets}
    return [max(bonferroni[s] for s in sets if i in s) for i in range(size)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_holm_is_closed_testing(seed, size):
    p = np.random.default_rng(seed).uniform(size=size) ** 3
    assert holm(p) == pytest.approx(closed_testing(p))


@pytest.mark.parametrize("size", [1, 2, 30])
def test_benjamini_hochberg_is_scipys(size):
    p = np.random.default_rng(size).uniform(size=size) ** 2
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_what_was_no_test_does_not_count(adjust):
    found = adjust([0.01, np.nan, 0.02])
    assert np.isnan(found[1])
    assert found[[0, 2]] == pytest.approx(adjust([0.01, 0.02]))
    assert len(adjust([])) == 0


def test_holm_rarely_errs_even_once():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(2000, 10))
    assert np.mean([holm(row).min() < 0.05 for row in p]) == pytest.approx(0.049, abs=0.015)

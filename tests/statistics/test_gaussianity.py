"""Tests of many rows at once against SciPy, powerlaw and chance, row by row."""

from __future__ import annotations

import time
import warnings

import numpy as np
import powerlaw
import pytest
from scipy import stats

from lightning_hessian.statistics import gaussianity
from lightning_hessian.statistics.gaussianity import ks_distances, normal_p_values, row_tests
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.statistics.significance import critical_value


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _signed_pareto(rng: np.random.Generator, exponent: float, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.pareto(exponent - 1, shape) + 1) * rng.choice([-1, 1], shape)


ROWS = {
    "gaussian": _rng(0).normal(size=(12, 300)),
    "pareto": _signed_pareto(_rng(1), 2.0, (12, 300)),
    "laplace": _rng(2).laplace(size=(12, 300)),
    "uniform": _rng(3).uniform(-1, 1, (12, 300)),
    "float32": _rng(4).normal(size=(12, 300)).astype(np.float32),
    "tiny": 1e-30 * _rng(5).normal(size=(12, 300)),
    "shifted": 1e3 + _rng(6).normal(size=(12, 300)),
    "tied": np.round(_rng(7).normal(size=(12, 300)), 1),
}


@pytest.mark.parametrize("k", [20, 300], ids=lambda k: f"K={k}")
@pytest.mark.parametrize("name", ROWS)
def test_ks_distances_are_those_of_scipy_and_powerlaw(name: str, k: int) -> None:
    rows = ROWS[name]
    found = ks_distances(rows, k)
    for row, distance in zip(rows, found, strict=True):
        top = np.sort(np.abs(row.astype(np.float64)))[-k:]
        if top[0] == 0:
            assert np.isnan(distance)
            continue
        ours = fit_power_law(top)
        fitted = stats.pareto(b=ours.exponent - 1, scale=top[0])
        assert distance == pytest.approx(stats.ks_1samp(top, fitted.cdf).statistic, abs=1e-6)
        assert distance == pytest.approx(ours.ks_distance, abs=1e-12)
        if name == "tiny":  # too small for powerlaw's own sums
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = powerlaw.Fit(
                top, xmin=top[0], parameter_ranges={"alpha": [1.0, 5000.0]}, verbose=0
            ).power_law
        assert ours.exponent == pytest.approx(theirs.alpha, rel=1e-5)
        # powerlaw 2.0 looks at one side of each jump: at most one jump (or tie) apart.
        jump = np.unique(top, return_counts=True)[1].max() / k
        assert theirs.D - 1e-6 <= distance <= theirs.D + jump + 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_p_values_are_those_of_normaltest(name: str) -> None:
    rows = ROWS[name][:, :100]
    expected = [stats.normaltest(row.astype(np.float64)).pvalue for row in rows]
    np.testing.assert_allclose(normal_p_values(rows), expected, rtol=1e-5, atol=1e-12)


def test_p_is_the_tail_of_chi_squared_and_a_small_one_rejects() -> None:
    """SG section 2 and eq. 9 say otherwise; its rates do not."""
    points = _rng(8).normal(size=(1, 100))
    statistic = (
        stats.skewtest(points[0]).statistic ** 2 + stats.kurtosistest(points[0]).statistic ** 2
    )
    assert normal_p_values(points)[0] == pytest.approx(stats.chi2(2).sf(statistic))
    far = _signed_pareto(_rng(9), 1.5, (50, 1000))
    assert row_tests(far).mean_p_value < 1e-3
    assert row_tests(far).gaussian_rate == 0.0


@pytest.mark.parametrize("length", [1000, 5000])
def test_gaussian_rows_are_gaussian_within_chance(length: int) -> None:
    count = 4000
    found = row_tests(_rng(length).normal(size=(count, length)).astype(np.float32))
    # At 100 points the test's own size is not 0.05 but this, by a simulation of SciPy alone.
    points = _rng(10).normal(size=(100_000, 100))
    size = float((stats.normaltest(points, axis=1).pvalue < 0.05).mean())
    assert size == pytest.approx(0.05, abs=0.01)
    error = np.sqrt(0.05 * 0.95 / count)
    assert abs(found.gaussian_rate - (1 - size)) < 4 * error
    assert abs(found.gaussian_rate - 0.95) < 4 * error + abs(size - 0.05)
    assert found.mean_p_value == pytest.approx(0.5, abs=0.03)
    assert found.power_law_rate < 0.01
    assert found.num_gaussian_tested == found.num_ks_tested == count


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.0])
def test_pareto_rows_are_power_laws(exponent: float) -> None:
    found = row_tests(_signed_pareto(_rng(11), exponent, (500, 5000)))
    assert found.power_law_rate > 0.99
    assert found.gaussian_rate < 0.2, "a hundred points of a light tail may pass"
    assert found.critical_value == critical_value(1000, 0.05) == pytest.approx(0.0430, abs=5e-5)


def test_the_critical_value_of_short_rows_is_that_of_sg_table_5() -> None:
    found = row_tests(_rng(12).normal(size=(30, 200)))
    assert found.num_values == 200
    assert found.critical_value == pytest.approx(0.0962, abs=5e-5)


def test_the_drawn_points_are_what_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rng(13).normal(size=(40, 500))
    seen = []

    def remember(points: np.ndarray) -> np.ndarray:
        seen.append(points.copy())
        return normal_p_values(points)

    monkeypatch.setattr(gaussianity, "normal_p_values", remember)
    row_tests(rows, num_points=60, seed=5)
    points = np.concatenate(seen)
    assert points.shape == (40, 60)
    positions = [
        [int(np.flatnonzero(row == value)[0]) for value in drawn]
        for row, drawn in zip(rows, points, strict=True)
    ]
    assert all(len(set(drawn)) == 60 for drawn in positions), "without replacement"
    assert len({tuple(sorted(drawn)) for drawn in positions}) == 40, "anew for each row"
    counts = np.bincount(np.ravel(positions), minlength=500)
    assert stats.chisquare(counts).pvalue > 1e-3, "every point equally likely"


def test_blocks_and_chunks_do_not_matter() -> None:
    rows = _rng(14).normal(size=(50, 400))
    whole = row_tests(rows, num_points=400)
    blocks = row_tests((rows[i : i + 7] for i in range(0, 50, 7)), num_points=400)
    np.testing.assert_array_equal(blocks.ks_distances, whole.ks_distances)
    np.testing.assert_allclose(blocks.p_values, whole.p_values, rtol=1e-9)


@pytest.mark.parametrize("length", [120, 40_000], ids=["long groups", "short groups"])
def test_the_points_of_a_row_depend_on_its_number(length: int) -> None:
    """So rows may be tested in parts, in several places."""
    rows = _rng(18).normal(size=(20, length))
    whole = row_tests(rows, num_points=30, seed=3)
    for start, stop in ((0, 7), (7, 8), (8, 20), (5, 16)):
        part = row_tests(rows[start:stop], num_points=30, seed=3, first=start)
        np.testing.assert_array_equal(part.p_values, whole.p_values[start:stop])
    other = row_tests(rows[:7], num_points=30, seed=3, first=1)
    assert (other.p_values != whole.p_values[:7]).all()


def test_rows_that_cannot_be_tested_are_counted_out() -> None:
    rows = _rng(15).normal(size=(6, 100))
    rows[0] = 0.0  # a parameter that no sample reaches
    rows[1, :60] = 0.0  # fewer than K entries that are not zero
    rows[2] = 3.0  # the same in every iteration
    found = row_tests(rows, num_values=50)
    assert np.isnan(found.ks_distances).tolist() == [True, True, True, False, False, False]
    assert np.isnan(found.p_values).tolist() == [True, False, True, False, False, False]
    assert (found.num_ks_tested, found.num_gaussian_tested) == (3, 4)
    assert found.mean_ks_distance == pytest.approx(found.ks_distances[3:].mean())
    nothing = row_tests(np.zeros((3, 100)))
    assert np.isnan([nothing.power_law_rate, nothing.mean_p_value, nothing.gaussian_rate]).all()


def test_the_input_is_left_alone() -> None:
    rows = _rng(16).normal(size=(5, 200)).astype(np.float32)
    before = rows.copy()
    row_tests(rows)
    np.testing.assert_array_equal(rows, before)


def test_it_is_quick() -> None:
    """61,706 rows of 5,000 take seconds: 2,000 of them, a thirtieth, well under one."""
    rows = _rng(17).normal(size=(2000, 5000)).astype(np.float32)
    start = time.perf_counter()
    row_tests(rows)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (np.ones((2, 19)), {}, "19 points of a row.*at least 20"),
        (np.ones((2, 50)), {"num_points": 10}, "10 points.*Raise num_points"),
        (np.ones((2, 50)), {"num_values": 1}, "num_values=1"),
        (np.full((2, 50), np.nan), {}, "NaN or infinite"),
        (np.ones((2, 50)), {"significance": 0.0}, "significance=0"),
        ([], {}, "no rows"),
        ([np.ones((2, 50)), np.ones((2, 51))], {}, "rows of 50 and of 51"),
    ],
)
def test_misuse(rows: object, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_tests(rows, **arguments)

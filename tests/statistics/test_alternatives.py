"""Likelihood ratios against powerlaw called by hand, SciPy's densities, and published tables."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import powerlaw
import pytest
from scipy import integrate, optimize, special, stats

from lightning_hessian.results import Alternative, PowerLawFit
from lightning_hessian.statistics.alternatives import NAMES
from lightning_hessian.statistics.power_law import fit_power_law


def truncated(k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws with density ~ x^-1.5 exp(-x / 20) above 1, by rejection from the power law."""
    found = np.empty(0)
    while len(found) < k:
        drawn = (1 - rng.uniform(size=4 * k)) ** -2.0
        kept = rng.uniform(size=4 * k) < np.exp(-(drawn - 1) / 20)
        found = np.append(found, drawn[kept])
    return found[:k]


DRAWS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "power_law": lambda k, rng: 1 + rng.pareto(1.2, k),
    "lognormal": lambda k, rng: rng.lognormal(0, 1, k),
    "truncated_power_law": truncated,
    "exponential": lambda k, rng: 1 + rng.exponential(1, k),
}


def sample(name: str, k: int, seed: int = 0) -> np.ndarray:
    return DRAWS[name](k, np.random.default_rng((seed, k)))


def by_name(fit: PowerLawFit) -> dict[str, Alternative]:
    return {alternative.name: alternative for alternative in fit.alternatives}


def by_hand(values: np.ndarray) -> powerlaw.Fit:
    """powerlaw's own fit, with room for exponents above 3, where its default range ends."""
    return powerlaw.Fit(values, xmin=values.min(), parameter_ranges={"alpha": [0, None]}, verbose=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", [1.0, 2.0**-30])
@pytest.mark.parametrize("name", DRAWS)
def test_ratios_are_those_of_powerlaw_called_by_hand(name: str, unit: float) -> None:
    values = sample(name, 300)
    theirs = by_hand(values / values.min())
    fit = fit_power_law(np.append(values * unit, -3.0), 300, alternatives=True)
    assert fit == fit_power_law(values * unit, alternatives=True)
    assert tuple(by_name(fit)) == NAMES
    cutoff = values.min() * unit
    for alternative in fit.alternatives:
        if alternative.reason is None:
            ratio, p_value = theirs.distribution_compare(
                "power_law", alternative.name, normalized_ratio=True
            )
            assert alternative.log_likelihood_ratio == pytest.approx(ratio, rel=1e-9)
            assert alternative.p_value == pytest.approx(p_value, rel=1e-9, abs=1e-15)
        expected = dict(getattr(theirs, alternative.name).parameters)
        if "mu" in expected:
            expected["mu"] += math.log(cutoff)
        if "Lambda" in expected:
            expected["Lambda"] /= cutoff
        assert alternative.parameters == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lognormal", "exponential"])
def test_units_of_the_values_move_no_ratio_of_powerlaw(name: str) -> None:
    # powerlaw's tolerances are absolute; in units of the values they mean something else.
    values = sample(name, 300)
    ratio, _ = by_hand(values).distribution_compare("power_law", name, normalized_ratio=True)
    found = by_name(fit_power_law(values, alternatives=True))[name].log_likelihood_ratio
    assert found == pytest.approx(ratio, rel=1e-3)


def log_densities(alternative: Alternative, values: np.ndarray) -> np.ndarray:
    """ln p of the values, by SciPy's distributions cut off below the smallest value."""
    found, cutoff = alternative.parameters, values.min()
    if alternative.name == "exponential":
        return stats.expon(loc=cutoff, scale=1 / found["Lambda"]).logpdf(values)
    if alternative.name == "lognormal":
        law = stats.lognorm(s=found["sigma"], scale=math.exp(found["mu"]))
        return law.logpdf(values) - law.logsf(cutoff)

    def density(x: float) -> float:
        return x ** -found["alpha"] * math.exp(-found["Lambda"] * x)

    mass, _ = integrate.quad(density, cutoff, np.inf, epsabs=0, epsrel=1e-10)
    return np.log([density(x) for x in values]) - math.log(mass)


@pytest.mark.parametrize("against", NAMES)
@pytest.mark.parametrize("name", ["lognormal", "truncated_power_law", "exponential"])
def test_ratio_and_p_value_are_vuongs_of_scipys_densities(name: str, against: str) -> None:
    # Clauset et al. 2009, appendix C: R, its deviation, and p = erfc(abs(R) / sqrt(2 n) sigma);
    # for nested distributions 2 R is chi-squared with one degree of freedom.
    values = sample(name, 200)
    fit = fit_power_law(values, alternatives=True)
    alternative = by_name(fit)[against]
    assert alternative.reason is None
    power_law = stats.pareto(b=fit.exponent - 1, scale=fit.cutoff).logpdf(values)
    terms = power_law - log_densities(alternative, values)
    deviation = terms.std() * math.sqrt(len(values))
    # powerlaw finds exponents below 1.5 by a simplex, to 1e-4.
    assert alternative.log_likelihood_ratio == pytest.approx(terms.sum() / deviation, rel=1e-3)
    if against == "truncated_power_law":
        expected = stats.chi2(1).sf(2 * abs(terms.sum()))
    else:
        expected = special.erfc(abs(terms.sum()) / deviation / math.sqrt(2))
    assert alternative.p_value == pytest.approx(expected, rel=0.05, abs=1e-12)


def test_parameters_are_the_most_likely_ones() -> None:
    values = sample("lognormal", 300)
    found = by_name(fit_power_law(values, alternatives=True))
    # Above a cutoff, an exponential is its mean excess.
    mean_excess = (values - values.min()).mean()
    assert found["exponential"].parameters["Lambda"] == pytest.approx(1 / mean_excess, rel=1e-3)

    def cost(point: np.ndarray) -> float:
        law = stats.lognorm(s=math.exp(point[1]), scale=math.exp(point[0]))
        return -float((law.logpdf(values) - law.logsf(values.min())).sum())

    best = optimize.minimize(cost, [0.0, 0.0], method="BFGS")
    ours = -log_densities(found["lognormal"], values).sum()
    assert ours == pytest.approx(best.fun, abs=1e-3)
    assert found["lognormal"].parameters["mu"] == pytest.approx(best.x[0], abs=0.01)


# Clauset et al. 2009, section 6, the table of tests on continuous data: normalised ratio and p of
# lognormal and exponential, and R (not over its deviation) and p of the power law with cut-off.
# Two ratios of the exponential are not compared, but for their sign: powerlaw's own tests have
# 1.43 (0.15) for blackouts, where the table has 1.21 (0.23), and for quakes we find 14.4, where it
# has 11.6. The maximum-likelihood exponential is known in closed form, and is compared above.
PUBLISHED = {
    "blackouts": (59, (-0.412, 0.68), None, (-0.382, 0.38)),
    "cities": (579, (-0.090, 0.93), (3.65, 0.00), (-0.123, 0.62)),
    "fires": (521, (-1.78, 0.08), (4.00, 0.00), (-5.02, 0.00)),
    "flares": (1711, (-0.803, 0.42), (13.7, 0.00), (-4.52, 0.00)),
    "quakes": (11697, (-7.14, 0.00), None, (-24.4, 0.00)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ratios(name: str) -> None:
    count, lognormal, exponential, cut_off = PUBLISHED[name]
    values = np.asarray(powerlaw.load_test_dataset(name), dtype=np.float64)
    found = by_name(fit_power_law(values, count, alternatives=True))
    # Cutoffs are published to a few digits, and ours is the value itself.
    for key, published in (("lognormal", lognormal), ("exponential", exponential)):
        if published is not None:
            assert found[key].log_likelihood_ratio == pytest.approx(
                published[0], rel=0.02, abs=0.03
            )
            assert found[key].p_value == pytest.approx(published[1], abs=0.025)
    assert found["exponential"].log_likelihood_ratio > 1.2
    assert found["truncated_power_law"].log_likelihood_ratio < 0
    assert found["truncated_power_law"].p_value == pytest.approx(cut_off[1], abs=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_one_wins_where_the_values_are_not_from_a_power_law(name: str) -> None:
    """The law that the values are from beats the power law at 5 %, in at least 80 of 100 samples.

    The binomial test at 1 % decides whether fewer are too few.
    """
    wins = 0
    for seed in range(100):
        found = by_name(fit_power_law(sample(name, 200, seed + 1), alternatives=True))
        true = found[name]
        assert true.reason is None
        wins += true.log_likelihood_ratio < 0 and true.p_value < 0.05
    assert stats.binomtest(wins, 100, 0.8, alternative="less").pvalue > 0.01


def test_a_power_law_is_seldom_given_up_and_beats_the_exponential() -> None:
    rejected = dict.fromkeys(NAMES, 0)
    won = missing = 0
    for seed in range(100):
        found = by_name(fit_power_law(sample("power_law", 200, seed + 1), alternatives=True))
        for name, alternative in found.items():
            if alternative.reason is None:
                rejected[name] += (
                    alternative.log_likelihood_ratio < 0 and alternative.p_value < 0.05
                )
        won += found["exponential"].log_likelihood_ratio > 0
        missing += found["lognormal"].reason is not None
    for count in rejected.values():
        assert stats.binomtest(count, 100, 0.05, alternative="greater").pvalue > 0.01
    assert stats.binomtest(won, 100, 0.95, alternative="less").pvalue > 0.01
    assert missing < 60  # where the lognormal runs to its limit, the record says so


def test_an_exponent_above_powerlaws_range_is_compared_as_it_was_fitted() -> None:
    # powerlaw ends alpha at 3 by default; a power law at the end of the range would lose.
    values = 1 + np.random.default_rng(1).pareto(5.0, 400)
    fit = fit_power_law(values, alternatives=True)
    assert fit.exponent > 5
    for alternative in fit.alternatives:
        assert (
            alternative.reason is not None
            or alternative.p_value > 0.01
            or (alternative.log_likelihood_ratio > 0)
        )


class TestFailures:
    def test_an_optimizer_without_end_is_told(self) -> None:
        # 2000 values of a true power law whose best lognormal is the limit itself.
        values = np.exp(-np.log1p(-(np.arange(2000) + 0.5) / 2000) / 1.2)
        lognormal = by_name(fit_power_law(values, alternatives=True))["lognormal"]
        if lognormal.reason is None:
            assert abs(lognormal.log_likelihood_ratio) < 1
        else:
            assert lognormal.log_likelihood_ratio is None
            assert lognormal.p_value is None
            assert "lognormal" in lognormal.reason
            assert lognormal.parameters["mu"] < -10

    @pytest.mark.parametrize(
        "values",
        [
            [1e300, 1e150, 1.0, 1e-150, 1e-300],
            [1 + 2e-15, 1 + 1e-15, 1.0],
            [4.0, 1.0, 1.0],
            [2.0, 1.0],
            [5e-324, 1e-310, 1e-300],
        ],
    )
    def test_what_powerlaw_cannot_do_is_reported_not_raised(self, values: list[float]) -> None:
        fit = fit_power_law(values, alternatives=True)
        assert tuple(by_name(fit)) == NAMES
        for alternative in fit.alternatives:
            missing = alternative.log_likelihood_ratio is None
            assert missing == (alternative.reason is not None) == (alternative.p_value is None)
            assert missing or math.isfinite(alternative.log_likelihood_ratio)
            assert alternative.reason is None or alternative.reason.endswith((".", ")"))

    def test_an_exception_becomes_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(self: object, data: object = None) -> None:
            raise ArithmeticError("no convergence")

        monkeypatch.setattr(powerlaw.Lognormal, "fit", fails)
        found = by_name(fit_power_law(sample("lognormal", 50), alternatives=True))
        assert found["lognormal"].reason == (
            "powerlaw could not compare the lognormal: no convergence"
        )
        assert found["lognormal"].log_likelihood_ratio is None
        assert found["exponential"].reason is None


class TestRecord:
    def test_there_are_none_unless_asked_for(self) -> None:
        values = sample("power_law", 50)
        assert fit_power_law(values).alternatives == ()
        assert fit_power_law(values, alternatives=False).alternatives == ()
        with pytest.raises(ValueError, match=r"alternatives=1 .*True or False"):
            fit_power_law(values, alternatives=1)

    def test_nothing_else_of_the_fit_changes(self) -> None:
        values = sample("lognormal", 50)
        plain, asked = fit_power_law(values), fit_power_law(values, alternatives=True)
        assert {**vars(asked), "alternatives": ()} == vars(plain)
        assert hash(asked) == hash(fit_power_law(values, alternatives=True))

    def test_powerlaw_says_nothing(self) -> None:
        shown = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(shown),
            np.errstate(all="raise"),
        ):
            warnings.simplefilter("error")
            fit_power_law(np.arange(1.0, 40.0), alternatives=True)  # whole numbers: it would warn
        assert shown.getvalue() == ""

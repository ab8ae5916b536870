"""What a row keeps of a measurement: the power law, and what is needed to judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
from rows import Gradients, Hessian, Row

from lightning_hessian import eigengaps, fit_power_law
from lightning_hessian.results import GradientStructure, HessianSpectrum
from lightning_hessian.statistics.power_law import optimal_cutoff

MOST_RANKS = 60
"""Of a spectrum that a result keeps for the figures; about 2 KB."""


def spectrum_numbers(spectrum: HessianSpectrum, row: Row) -> dict[str, Any]:
    """Return the numbers of a row from a spectrum.

    All positive values are fitted, whether their convergence is proven or not: in float32 rounding
    hides the proof for the smaller ones. ``num_converged`` says for how many it is there.
    """
    measure = row.measure
    assert isinstance(measure, Hessian)
    positive = spectrum.eigenvalues > 0
    values = spectrum.eigenvalues[positive][: measure.k]
    if measure.statistic == "eigengaps":
        residuals = spectrum.residuals[positive][: measure.k]
        gaps = eigengaps(values, np.where(spectrum.converged[positive], residuals, 0.0))
        found = {"rank_slope": gaps.rank_slope, **_law(gaps.gaps[gaps.fitted], measure.k)}
    else:
        found = _law(values, measure.k)
    return {
        **found,
        "lambda_1": float(spectrum.eigenvalues[0]),
        "num_values": len(spectrum.eigenvalues),
        "num_positive": int(positive.sum()),
        "num_converged": spectrum.num_converged,
        "num_copies": spectrum.num_copies,
        "products": spectrum.num_hvps,
        "engine": spectrum.engine,
        "seconds": round(spectrum.seconds, 1),
    }


def gradient_numbers(structure: GradientStructure, row: Row) -> dict[str, Any]:
    """Return the numbers of a row from the gradients of mini-batches."""
    measure = row.measure
    assert isinstance(measure, Gradients)
    if measure.statistic in ("dimension", "iteration"):
        tests = (
            structure.dimension_tests
            if measure.statistic == "dimension"
            else structure.iteration_tests
        )
        assert tests is not None
        found: dict[str, Any] = {
            "d_ks": tests.mean_ks_distance,
            "d_c": tests.critical_value,
            "rate": tests.power_law_rate,
            "p_value": tests.mean_p_value,
            "gaussian_rate": tests.gaussian_rate,
            "num_tested": [tests.num_ks_tested, tests.num_gaussian_tested],
        }
        found["power_law"] = found["rate"] > 0.5
        if tests.typical is not None:
            found["spectrum"] = _thinned(tests.typical.values)
    elif measure.statistic == "eigengaps":
        gaps = eigengaps(structure.leading[: measure.k])
        found = {"rank_slope": gaps.rank_slope, **_law(gaps.gaps[gaps.fitted], measure.k)}
    else:
        second = structure.second_moment
        floor = 10 * structure.rounding
        values = structure.leading if measure.statistic == "covariance" else second[second > floor]
        found = _law(values, measure.k)
    return {
        **found,
        "num_gradients": structure.num_gradients,
        "loss": structure.loss,
        "engine": structure.engine,
        "seconds": round(structure.seconds, 1),
    }


def _law(values: Any, k: int) -> dict[str, Any]:
    """Return the power law of the k largest values, of all where there are fewer."""
    values = np.sort(np.asarray(values))[::-1][:k]
    if len(values) < 10:
        return {"k": len(values), "reason": "fewer than ten positive values"}
    fit, best = fit_power_law(values), optimal_cutoff(values)
    return {
        "k": fit.num_values,
        "d_ks": fit.ks_distance,
        "d_c": fit.critical_value,
        "power_law": fit.is_power_law,
        "p_value": fit.p_value,
        "beta": fit.exponent,
        "sigma": fit.exponent_std_error,
        "s": fit.slope,
        "k_of_least_d_ks": best.num_values,
        "least_d_ks": best.ks_distance,
        "spectrum": _thinned(values),
    }


def _thinned(values: Any) -> dict[str, list[Any]]:
    """Return some of the descending values with their ranks, enough for a logarithmic axis."""
    ranks = np.unique(np.geomspace(1, len(values), MOST_RANKS).round().astype(int))
    return {"ranks": ranks.tolist(), "values": np.asarray(values)[ranks - 1].tolist()}

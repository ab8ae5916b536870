"""What is logged of a gradient structure: the scalars by their keys, and why one is missing."""

from __future__ import annotations

import numpy as np

from lightning_hessian.results import GradientStructure
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.statistics.subspace import num_outliers
from lightning_hessian.tracking.scalars import eigengap_scalars, power_law_scalars

CORRELATED = (
    "d_ks",
    "s_hat",
    "lambda_1",
    "trace",
    "num_outliers",
    "power_law_rate",
    "gaussian_rate",
)
"""The statistics whose correlation with the monitored metrics is tracked."""


def gradient_scalars(
    structure: GradientStructure, significance: float = 0.05
) -> tuple[dict[str, float], list[str]]:
    """Return the statistics of a gradient structure, and a sentence for each that is absent.

    ``lambda_1``, ``trace``, the power law and the outliers are those of the covariance;
    ``power_law_rate`` is that of the gradients over their dimensions and ``gaussian_rate`` that of
    the parameters over the iterations, as in what SG finds; the other two rates stand beside them
    as ``iteration_power_law_rate`` and ``dimension_gaussian_rate``.

    Args:
        structure: What was measured.
        significance: Level of the Kolmogorov-Smirnov test of the spectrum, and of the outliers.

    Returns:
        Name (without prefix) to value, and the reasons for what is absent.
    """
    leading = structure.leading
    scalars: dict[str, float] = {
        "num_gradients": structure.num_gradients,
        "num_eigenvalues": len(structure.covariance),
        "num_fitted": len(leading),
        "lambda_1": float(structure.covariance[0]),
        "trace": structure.covariance_trace,
        "mean_gradient_norm": structure.mean_gradient_norm,
        "seconds": structure.seconds,
        "loss": structure.loss,
    }
    absent: list[str] = []
    try:
        fit = fit_power_law(leading, significance=significance)
        scalars |= power_law_scalars(fit)
        if fit.reason is not None:
            absent.append(f"power_law is left out: {fit.reason}")
    except ValueError as error:
        absent.append(f"No power law was fitted to the covariance's eigenvalues: {error}")
    try:
        rounding = np.full(len(leading), structure.rounding)
        scalars |= eigengap_scalars(eigengaps(leading, rounding, significance=significance))
    except ValueError as error:
        absent.append(f"No power law was fitted to the covariance's eigengaps: {error}")
    try:
        scalars["num_outliers"] = num_outliers(leading, significance=significance)
    except ValueError as error:
        absent.append(f"No outliers were counted: {error}")
    rates, missing = _rates(structure)
    return scalars | rates, absent + missing


def _rates(structure: GradientStructure) -> tuple[dict[str, float], list[str]]:
    """Return the rates of the tests, and why one is absent."""
    dimensions, iterations = structure.dimension_tests, structure.iteration_tests
    if dimensions is None or iterations is None:
        return {}, []
    rates: dict[str, float] = {}
    absent: list[str] = []
    for tests, what, power_law, gaussian in (
        (dimensions, "gradient", "power_law_rate", "dimension_gaussian_rate"),
        (iterations, "parameter", "iteration_power_law_rate", "gaussian_rate"),
    ):
        if tests.num_ks_tested:
            rates[power_law] = tests.power_law_rate
        else:
            absent.append(
                f"{power_law} is left out: no {what} has {tests.num_values} entries that are "
                "neither zero nor all equal."
            )
        if tests.num_gaussian_tested:
            rates[gaussian] = tests.gaussian_rate
        else:
            absent.append(f"{gaussian} is left out: the entries of every {what} are all equal.")
    return rates, absent

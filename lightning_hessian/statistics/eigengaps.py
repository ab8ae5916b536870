"""Gaps between neighbouring eigenvalues: their power law, and how far eigenvectors can turn.

Sources: HPL is "Investigating the Overlooked Hessian Structure" (Tang et al., ICML 2025),
section 2.4 and appendix B; Y. Yu, T. Wang, R. J. Samworth, "A useful variant of the Davis-Kahan
theorem for statisticians", Biometrika 102 (2015).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_hessian.results import Eigengaps, FloatArray, arguments
from lightning_hessian.results.arguments import (
    checked,
    flag,
    optional,
    real_number,
    significance_level,
)
from lightning_hessian.statistics.power_law import finite_values, fit_power_law

_MIN_POSITIVE_GAPS = 3


_RULES = {
    "eigenvalues": arguments.finite_values,
    "residuals": optional(arguments.real_values),
    "significance": significance_level,
    "perturbation_norm": real_number("It is not a norm; give eps * norm(M) >= 0.", least=0.0),
    "complete": flag,
}


@checked(_RULES)
def eigengaps(eigenvalues: ArrayLike, *, significance: float = 0.05) -> Eigengaps:
    """Return the gaps of a spectrum and their power law, by original rank and re-sorted.

    A gap of two computed eigenvalues is known only to the sum of their errors: hand over
    eigenvalues whose residuals are small beside their gaps. The standard error of the rank
    slope is that of least squares with independent errors, which neighbouring gaps are not:
    read it as a lower bound.

    Args:
        eigenvalues: lambda_k, real [K] in any order; they are sorted descending. Negative ones
            take part: only their differences matter.
        significance: Level of the critical value of the re-sorted fit.

    Raises:
        ValueError: An eigenvalue is NaN or infinite, fewer than 3 gaps are positive, or all
            positive gaps are equal.

    Source: HPL eq. 11 to 13 and figure 2.

    Example:
        >>> found = eigengaps(1.0 / np.arange(1.0, 101.0))  # gaps 1 / (k (k + 1)): s + 1 = 2
        >>> found.gaps[:3].round(4).tolist()
        [0.5, 0.1667, 0.0833]
        >>> round(found.rank_slope, 2), found.num_zero
        (1.92, 0)
    """
    descending = np.sort(finite_values(eigenvalues))[::-1]
    gaps = -np.diff(descending)
    positive = gaps > 0
    num_positive = int(positive.sum())
    if num_positive < _MIN_POSITIVE_GAPS:
        raise ValueError(
            f"only {num_positive} gaps between {len(descending)} eigenvalues are positive, and a "
            f"fit needs {_MIN_POSITIVE_GAPS}; compute more eigenvalues."
        )
    if np.ptp(gaps[positive]) == 0:
        raise ValueError(
            f"all {num_positive} positive eigengaps are equal to {gaps[positive][0]:g}, so no "
            "power law fits them; compute more eigenvalues."
        )
    ranks = np.flatnonzero(positive) + 1
    line = stats.linregress(np.log(ranks), np.log(gaps[positive]))
    return Eigengaps(
        gaps=gaps,
        fit=fit_power_law(gaps[positive], significance=significance),
        rank_slope=-float(line.slope),
        rank_slope_std_error=float(line.stderr),
        num_zero=len(gaps) - num_positive,
    )


@checked(_RULES)
def davis_kahan_bound(
    eigenvalues: ArrayLike, perturbation_norm: float, *, complete: bool = False
) -> FloatArray:
    """Return for each eigenvector the most that the sine of its angle to the perturbed one can be.

    The bound of u_k is 2 eps norm(M) / min(lambda_{k-1} - lambda_k, lambda_k - lambda_{k+1}) for
    the Hessian H + eps M in place of H. At 1 and above it says nothing; such values are kept,
    since how far they lie above 1 is what HPL plots. A zero gap gives infinity: an eigenvector
    of a repeated eigenvalue is not determined.

    The first eigenvector has nothing above it, and its one gap is the right one. The last has a
    next eigenvalue below that was not computed and may lie arbitrarily close, so its gap above
    alone would not bound anything: its entry is NaN, unless the spectrum is ``complete``.

    Args:
        eigenvalues: lambda_k, real [K], descending, as the rows of the eigenvectors.
        perturbation_norm: eps norm(M), the operator norm of the perturbation, in the units of
            the eigenvalues.
        complete: Whether these are all n eigenvalues of H, so that the last has nothing below.

    Returns:
        The bounds, float64 [K].

    Raises:
        ValueError: An eigenvalue is NaN or infinite, they are not descending, or the norm is
            negative or not finite.

    Source: HPL eq. 7, first line, and theorem 2 (Yu et al. 2015, corollary 1).

    Example:
        >>> davis_kahan_bound([10.0, 6.0, 5.0, 4.5], 0.25).tolist()
        [0.125, 0.5, 1.0, nan]
        >>> davis_kahan_bound([10.0, 6.0, 5.0, 4.5], 0.25, complete=True).tolist()
        [0.125, 0.5, 1.0, 1.0]
    """
    lambdas = finite_values(eigenvalues)
    gaps = -np.diff(lambdas)
    if np.any(gaps < 0):
        raise ValueError(
            "the eigenvalues are not in descending order, so the bounds would not belong to the "
            "rows of the eigenvectors; sort both alike."
        )
    last = np.inf if complete else np.nan
    above = np.concatenate([[np.inf], gaps])
    below = np.concatenate([gaps, [last]])
    narrower = np.minimum(above, below)[: len(lambdas)]
    bounds = np.full(len(lambdas), np.inf)
    np.divide(2.0 * perturbation_norm, narrower, out=bounds, where=narrower != 0)
    return bounds

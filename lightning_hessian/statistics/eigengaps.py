"""Gaps between neighbouring eigenvalues, and their power law.

Source: HPL is "Investigating the Overlooked Hessian Structure" (Tang et al., ICML 2025),
section 2.4 and appendix B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import ArgumentError, Eigengaps, FloatArray, array_arguments
from lightning_hessian.results.arguments import checked, optional, significance_level
from lightning_hessian.statistics.power_law import fit_power_law

_MIN_POSITIVE_GAPS = 3

_RULES = {
    "eigenvalues": array_arguments.finite_values,
    "residuals": optional(array_arguments.finite_values),
    "significance": significance_level,
}


@checked(_RULES)
def eigengaps(
    eigenvalues: ArrayLike, residuals: ArrayLike | None = None, *, significance: float = 0.05
) -> Eigengaps:
    """Return the gaps of a spectrum and their power law, by original rank and re-sorted.

    A gap of two computed eigenvalues is known only to the sum of their errors. One that is no
    larger than the sum of the two residual bounds is no gap: copies of a repeated eigenvalue
    differ by rounding, and rounding follows laws of its own. Such gaps are left out of both fits,
    and counted; the others keep their rank. The standard error of the rank
    slope is that of least squares with independent errors, which neighbouring gaps are not:
    read it as a lower bound.

    Args:
        eigenvalues: lambda_k, real [K] in any order; they are sorted descending. Negative ones
            take part: only their differences matter.
        residuals: Bounds on the errors of the eigenvalues, in the same order, real [K], such as
            ``HessianSpectrum.residuals``; by default they are taken to be exact but for the
            rounding of a float64.
        significance: Level of the critical value of the re-sorted fit.

    Raises:
        ValueError: An eigenvalue or a bound is NaN or infinite, there are not as many bounds as
            eigenvalues or one is negative, fewer than 3 gaps are left, or all that are left are
            equal, or as good as equal within their bounds.

    Source: HPL eq. 11 to 13 and figure 2.

    Example:
        >>> found = eigengaps(1.0 / np.arange(1.0, 101.0))  # gaps 1 / (k (k + 1)): s + 1 = 2
        >>> found.gaps[:3].round(4).tolist()
        [0.5, 0.1667, 0.0833]
        >>> round(found.rank_slope, 2), found.num_zero
        (1.92, 0)
    """
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    errors = _bounds(values, residuals)
    order = np.argsort(values)[::-1]
    gaps, allowed = -np.diff(values[order]), errors[order][:-1] + errors[order][1:]
    fitted = gaps > allowed
    num_zero = int((gaps == 0).sum())
    num_below = len(gaps) - num_zero - int(fitted.sum())
    kept = gaps[fitted]
    # What is no more than rounding of float64 tells no two gaps apart either.
    known = allowed[fitted] + 2 * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    if len(kept) < _MIN_POSITIVE_GAPS:
        below = f"; {num_below} are no larger than their residual bounds" if num_below else ""
        raise ValueError(
            f"only {len(kept)} gaps between {len(values)} eigenvalues are positive{below}, and a "
            f"fit needs {_MIN_POSITIVE_GAPS}; compute more eigenvalues"
            + (", or lower tol." if num_below else ".")
        )
    if (kept - known).max() <= (kept + known).min():
        raise ValueError(
            f"all {len(kept)} positive eigengaps are equal to {kept[0]:g}, within what they are "
            "known to, so no power law fits them; compute more eigenvalues."
        )
    from scipy.stats import linregress

    line = linregress(np.log(np.flatnonzero(fitted) + 1), np.log(kept))
    return Eigengaps(
        gaps=gaps,
        fit=fit_power_law(kept, significance=significance),
        rank_slope=-float(line.slope),
        rank_slope_std_error=float(line.stderr),
        num_zero=num_zero,
        num_below_bounds=num_below,
        fitted=fitted,
    )


def _bounds(values: FloatArray, residuals: ArrayLike | None) -> FloatArray:
    """Return the bounds on the errors of eigenvalues [K], zeros where none are given."""
    if residuals is None:
        return np.zeros(len(values))
    errors = np.asarray(residuals, dtype=np.float64).ravel()
    if len(errors) != len(values) or bool((errors < 0).any()):
        raise ArgumentError(
            "residuals", residuals, f"Give {len(values)} bounds >= 0, one for each eigenvalue."
        )
    return errors

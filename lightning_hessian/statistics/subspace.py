"""Two symmetric matrices side by side: overlaps of their top subspaces, ratios of their spectra.

Made for the covariance C of gradients and the Hessian H. SG is "On the Overlooked Structure of
Stochastic Gradients" (Xie et al., NeurIPS 2023), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import FloatArray
from lightning_hessian.results.arguments import checked, significance_level
from lightning_hessian.results.array_arguments import finite_values


@dataclass(frozen=True, eq=False)
class Proportionality:
    """How far one spectrum is a multiple of another, rank by rank.

    Attributes:
        ratios: Eigenvalue of the one over that of the other at each rank, float64 [K].
        constant: Their geometric mean; SG eq. 3 expects 1 / B for C over H near a minimum.
        spread: Their geometric standard deviation, a factor: 1 for proportional spectra, and
            above 10 where ratios differ by more than an order of magnitude.
    """

    ratios: FloatArray
    constant: float
    spread: float


_RULES = {
    "first": finite_values,
    "second": finite_values,
    "eigenvalues": finite_values,
    "significance": significance_level,
}


@checked(_RULES)
def overlaps(first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Return for each k how much the spans of the first k vectors of two sets have in common.

    The overlap is norm_F(U_k V_k^T)^2 / k, the mean squared cosine of the principal angles: 1 for
    the same span, 0 for orthogonal ones, and k / n on average for random ones.

    Args:
        first: Orthonormal rows [a, n], leading eigenvector first.
        second: Likewise [b, n].

    Returns:
        Overlaps for k = 1 to min(a, b), float64.

    Raises:
        ValueError: The vectors are not rows of equal length, one is NaN or infinite, or they are
            not orthonormal.

    Example:
        >>> overlaps([[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]])
        array([0., 1.])
    """
    one, other = _rows(first, second)
    for rows in (one, other):
        departure = np.abs(rows @ rows.T - np.eye(len(rows))).max()
        if departure > 1e-2:
            raise ValueError(
                f"the rows are not orthonormal (off by {departure:.1g}), so their overlap has no "
                "meaning; give eigenvectors of a symmetric matrix."
            )
    count = min(len(one), len(other))
    squares = np.square(one[:count] @ other[:count].T)
    within = squares.cumsum(axis=0).cumsum(axis=1).diagonal()
    found: FloatArray = np.minimum(within / np.arange(1, count + 1), 1.0)
    return found


@checked(_RULES)
def proportionality(first: ArrayLike, second: ArrayLike) -> Proportionality:
    """Return the ratio of two spectra by rank, with its geometric mean and spread.

    Ranks at which either eigenvalue is not positive, and all below them, are left out.

    Args:
        first: Eigenvalues of the one matrix (C), descending.
        second: Those of the other (H), descending.

    Raises:
        ValueError: Fewer than two ranks are left, or a spectrum is not descending.

    Source: SG eq. 3 and figure 5.

    Example:
        >>> found = proportionality([8.0, 4.0, 2.0], [4.0, 2.0, 1.0, 0.5])
        >>> found.constant, found.spread
        (2.0, 1.0)
    """
    spectra = [_descending(first), _descending(second)]
    positive = [int((values > 0).sum()) for values in spectra]
    count = min(positive)
    if count < 2:
        raise ValueError(
            f"only {count} ranks have positive eigenvalues in both spectra, and a spread needs 2; "
            "compute more eigenvalues."
        )
    ratios = spectra[0][:count] / spectra[1][:count]
    logs = np.log(ratios)
    return Proportionality(ratios, float(math.exp(logs.mean())), float(math.exp(logs.std(ddof=1))))


@checked(_RULES)
def num_outliers(eigenvalues: ArrayLike, *, significance: float = 0.05) -> int:
    """Return how many of the top eigenvalues stand off the power law of those below.

    Under a power law of slope s, the gaps k ln(lambda_k / lambda_{k+1}) are independent and
    exponential with mean s (Renyi 1953). The last of them that is larger than the largest would
    be by chance, at the given level (Fisher 1929), parts the outliers from the rest; without one
    there are none. Only the upper half of the spectrum is looked at, since the end of a sampled
    spectrum falls off steeply, and s is its mean gap without those that were found too large.

    A step is told from the slope where lambda_k / lambda_{k+1} > exp(s x / k), with x about 6
    for 50 values and 9 for 1000: a factor of 2 to 4 at k = 9 and s = 1.3, but of a thousand and
    more at k = 1, where a power law itself makes large steps. SG finds c - 1 outliers for c
    classes.

    Args:
        eigenvalues: Real [K], in any order; those that are not positive are left out.
        significance: Chance of finding outliers in a power law without any.

    Raises:
        ValueError: Fewer than 4 positive values, one is NaN or infinite, or the level is none.

    Sources: A. Renyi, "On the theory of order statistics" (1953); R. A. Fisher, "Tests of
    significance in harmonic analysis" (1929); SG section 5.5, figure 11.

    Example:
        >>> bulk = 1.0 / np.arange(1.0, 100.0)
        >>> num_outliers(bulk), num_outliers([90.0, 80.0, 70.0, *bulk])
        (0, 3)
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())[::-1]
    values = values[values > 0]
    if len(values) < 4:
        raise ValueError(
            f"only {len(values)} eigenvalues are positive, and telling outliers needs 4; compute "
            "more."
        )
    gaps = (np.arange(1, len(values)) * -np.diff(np.log(values)))[: len(values) // 2]
    count = len(gaps)
    # Fisher's test: the largest of n exponentials exceeds n (1 - (alpha / n)^(1 / (n - 1))) times
    # their mean with probability alpha.
    threshold = -count * math.expm1(math.log(significance / count) / (count - 1))
    too_large = np.zeros(len(gaps), dtype=bool)
    while True:
        found = gaps > threshold * gaps[~too_large].mean()
        if (found == too_large).all() or found.all():
            break
        too_large |= found
    return int(np.flatnonzero(too_large)[-1]) + 1 if too_large.any() else 0


def _rows(first: ArrayLike, second: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return two sets of vectors as float64 rows of equal length."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or not one.shape[1]:
        raise ValueError(
            f"two sets of vectors of equal length are needed, as rows, but the shapes are "
            f"{one.shape} and {other.shape}; take both with the same `parameters`."
        )
    if not len(one) or not len(other):
        raise ValueError("a set of vectors is empty; ask for eigenvectors.")
    return one, other


def _descending(eigenvalues: ArrayLike) -> FloatArray:
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    if np.any(np.diff(values) > 0):
        raise ValueError("the eigenvalues are not in descending order, so they have no rank; sort.")
    return values

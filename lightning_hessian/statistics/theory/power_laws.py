"""What a power law of the eigenvalues says of their density, their gaps and their eigenvectors.

Eigenvalues are those of a Hessian, in loss / parameter^2, and so are their gaps. beta is the
exponent of the density p(lambda) = lambda^-beta / Z_c (eq. 1), s = 1 / (beta - 1) the slope of
lambda_k against the rank k (eq. 3).

Source: HPL is "Investigating the Overlooked Hessian Structure" (Tang et al., ICML 2025), sections
2.1, 2.2 and appendices A, B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import ArgumentError, FloatArray
from lightning_hessian.results.arguments import checked, real_number, whole_number
from lightning_hessian.results.array_arguments import finite_values, real_values

_MOST_VALUES = 10_000_000  # 80 MB; more gaps than anybody draws

_positive = real_number("Give a positive number.", above=0.0)

_RULES = {
    "x": real_values,
    "eigenvalues": finite_values,
    "num_eigenvalues": whole_number(least=2, most=_MOST_VALUES),
    "beta": real_number("Give an exponent above 1: else the density has no finite mass.", above=1),
    "slope": _positive,
    "trace": _positive,
    "cutoff": _positive,
    "perturbation": _positive,
    "lambda_1": _positive,
}


@checked(_RULES)
def max_entropy_density(x: ArrayLike, beta: float, cutoff: float = 1.0) -> FloatArray:
    """Return the density of most entropy, e^(-beta_norm) x^(-beta_vol) (HPL theorem 1, eq. 6).

    Among densities on [cutoff, infinity) it maximises S_total = S_p + beta_vol S_vol, with the
    spectral entropy S_p = -int p ln p (eq. 5) and the volume entropy S_vol = -int p ln lambda
    (eq. 4). Its normalisation is e^(-beta_norm) = 1 / Z_c = (beta - 1) cutoff^(beta - 1), and
    S_total is then beta_norm = ln Z_c. HPL names no support; without a cutoff there is no such
    density, since x^-beta has infinite mass at 0.

    Args:
        x: Eigenvalues, any shape, in the unit of the cutoff.
        beta: beta_vol, the weight of the volume entropy, above 1; the exponent of eq. 1.
        cutoff: lambda_K, the smallest eigenvalue of the law.

    Returns:
        The density, in one over the unit of the cutoff; zero below it. float64, the shape of x.

    Raises:
        ValueError: beta is not above 1, or the cutoff is not positive.

    Example:
        >>> max_entropy_density([0.5, 1.0, 2.0], beta=2.0)
        array([0.  , 1.  , 0.25])
    """
    at = np.asarray(x, dtype=np.float64)
    inside = at >= cutoff
    ratio = np.where(inside, at, cutoff) / cutoff
    found: FloatArray = np.where(inside, (beta - 1) / cutoff * ratio**-beta, 0.0)
    return found


@checked(_RULES)
def zipf_eigenvalues(num_eigenvalues: int, slope: float, trace: float = 1.0) -> FloatArray:
    """Return Tr(H) k^(-s) / Z_d for k = 1..n, with Z_d = sum k^(-s) (HPL eq. 2).

    With a trace of 1 these are the trace-normalised f_k of eq. 2. The first is Tr(H) / Z_d, the
    lambda_1 of eq. 3.

    Args:
        num_eigenvalues: n, over which the trace is shared out.
        slope: s = 1 / (beta - 1).
        trace: Tr(H), the sum of the n eigenvalues.

    Returns:
        lambda_k in the unit of the trace, float64 [n], descending.

    Raises:
        ValueError: There are fewer than 2 eigenvalues, or the slope or the trace is not positive.

    Example:
        >>> zipf_eigenvalues(3, 1.0, trace=11.0)
        array([6., 3., 2.])
    """
    powers = _ranks(num_eigenvalues) ** -slope
    found: FloatArray = trace / powers.sum() * powers
    return found


@checked(_RULES)
def zipf_eigengaps(num_eigenvalues: int, slope: float, trace: float = 1.0) -> FloatArray:
    """Return the gaps of `zipf_eigenvalues`, Tr(H) (k^(-s) - (k+1)^(-s)) / Z_d (HPL eq. 11).

    Args:
        num_eigenvalues: n.
        slope: s = 1 / (beta - 1).
        trace: Tr(H), the sum of the n eigenvalues.

    Returns:
        delta_k = lambda_k - lambda_{k+1} in the unit of the trace, float64 [n - 1].

    Raises:
        ValueError: As `zipf_eigenvalues`.

    Example:
        >>> zipf_eigengaps(3, 1.0, trace=11.0)
        array([3., 1.])
    """
    return eigengaps_of_values(zipf_eigenvalues(num_eigenvalues, slope, trace), slope)


@checked(_RULES)
def eigengaps_of_values(eigenvalues: ArrayLike, slope: float) -> FloatArray:
    """Return lambda_k [1 - (k / (k + 1))^s], the gap that a power law has below lambda_k.

    For eigenvalues of the law itself this is eq. 11 in another form (HPL eq. 12). For measured
    ones it is what the law expects of the next gap, given the eigenvalue.

    Args:
        eigenvalues: lambda_k, real [K] in any order; they are sorted descending.
        slope: s = 1 / (beta - 1).

    Returns:
        delta_k in the unit of the eigenvalues, float64 [K - 1].

    Raises:
        ValueError: There are fewer than 2 eigenvalues, one is not finite, or the slope is not
            positive.

    Example:
        >>> eigengaps_of_values([6.0, 3.0, 2.0], 1.0)
        array([3., 1.])
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())[::-1]
    if len(values) < 2:
        raise ArgumentError("eigenvalues", eigenvalues, "Give two eigenvalues at least.")
    ranks = _ranks(len(values) - 1)
    # 1 - (k / (k + 1))^s without cancellation at large k.
    shares: FloatArray = -np.expm1(-slope * np.log1p(1 / ranks))
    return values[:-1] * shares


@checked(_RULES)
def approximate_eigengaps(num_eigenvalues: int, slope: float, trace: float = 1.0) -> FloatArray:
    """Return Tr(H) (k + 1)^(-(s + 1)) / Z_d, a power law of slope s + 1 (HPL eq. 13).

    HPL derives it for s near 1. At large k it is the exact gap of `zipf_eigengaps` over s, and at
    k = 1, s = 1 half of it.

    Args:
        num_eigenvalues: n.
        slope: s = 1 / (beta - 1).
        trace: Tr(H), the sum of the n eigenvalues.

    Returns:
        delta_k in the unit of the trace, float64 [n - 1].

    Raises:
        ValueError: As `zipf_eigenvalues`.

    Example:
        >>> approximate_eigengaps(3, 1.0, trace=11.0).round(3)
        array([1.5  , 0.667])
    """
    first = zipf_eigenvalues(num_eigenvalues, slope, trace)[0]
    found: FloatArray = first * (_ranks(num_eigenvalues - 1) + 1) ** -(slope + 1)
    return found


@checked(_RULES)
def eigenvector_bound(
    num_eigenvalues: int, slope: float, perturbation: float, lambda_1: float
) -> FloatArray:
    """Return 2 eps norm(M) (k + 1)^(s + 1) / lambda_1, a bound on sin(u_k, u~_k) (HPL eq. 14).

    u_k are the eigenvectors of H and u~_k those of H + eps M. It is the Davis-Kahan bound (eq. 7)
    with the gap below lambda_k after `approximate_eigengaps`, the smaller of the two. So it
    inherits the assumption that s is near 1. From 1 on it says nothing, and is returned as it is.

    Args:
        num_eigenvalues: n.
        slope: s = 1 / (beta - 1).
        perturbation: eps norm(M), the operator norm of what is added to H, in the unit of
            lambda_1.
        lambda_1: The largest eigenvalue, Tr(H) / Z_d.

    Returns:
        The bounds of k = 1..n - 1, without a unit, float64 [n - 1]; infinite where they overflow.

    Raises:
        ValueError: There are fewer than 2 eigenvalues, or an argument is not positive.

    Example:
        >>> eigenvector_bound(4, 1.0, perturbation=0.01, lambda_1=2.0).round(3)
        array([0.04, 0.09, 0.16])
    """
    with np.errstate(over="ignore"):
        growth: FloatArray = (_ranks(num_eigenvalues - 1) + 1) ** (slope + 1)
        return 2 * perturbation * growth / lambda_1


def _ranks(count: int) -> FloatArray:
    return np.arange(1.0, count + 1)

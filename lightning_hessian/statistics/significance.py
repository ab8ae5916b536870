"""When a power law is rejected: the critical value of HPL, and a p-value that knows of the fit.

Both judge the Kolmogorov-Smirnov (KS) distance d_ks between K values and a power law. The
logarithms of Pareto values, measured from their cutoff, are exponential, so that the distance is
that of an exponential distribution, and the p-value is Lilliefors' for an exponential
distribution whose scale comes from the same data.

Sources: HPL is "Investigating the Overlooked Hessian Structure" (Tang et al., ICML 2025);
H. W. Lilliefors, "On the Kolmogorov-Smirnov test for the exponential distribution with mean
unknown", JASA 64 (1969).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from lightning_hessian.results import FloatArray
from lightning_hessian.results.arguments import (
    checked,
    real_number,
    significance_level,
    whole_number,
)

# HPL table 6 (Massey 1951): c in d_c = c / sqrt(K).
_CRITICAL_COEFFICIENTS = {0.2: 1.07, 0.15: 1.14, 0.1: 1.22, 0.05: 1.36, 0.01: 1.63}

LEAST_FOR_VERDICT = 23
"""The fewest values that have a verdict; see `fit_power_law` for the reason."""

_NUM_SIMULATIONS = 9999
_NULL_SEED = 16
# Above this size sqrt(K) * d_ks has reached its limit within the Monte Carlo error.
_LARGEST_SIMULATED = 2000
# Floats simulated at a time: 2 MiB stay in the cache.
_CHUNK = 2**18

_RULES = {
    "k": whole_number(least=1),
    "significance": significance_level,
    "ks_distance": real_number("Give a distance from 0 to 1.", least=0.0, most=1.0),
}


@checked(_RULES)
def critical_value(k: int, significance: float = 0.05) -> float:
    """Return the KS distance d_c = c / sqrt(K) at which K values reject the power law.

    c is that of HPL table 6 at the levels 0.2, 0.15, 0.1, 0.05 and 0.01, and the quantile of
    Kolmogorov's limiting distribution elsewhere. It belongs to a distribution specified before
    the data were seen; with a fitted exponent d_ks is smaller, and the test seldom rejects
    at all. For K below 36 table 6 does not hold: d_c is then up to a few percent too large.

    Raises:
        ValueError: ``k`` is below 1, or ``significance`` is not strictly between 0 and 1.

    Source: HPL table 6 (Massey 1951); `scipy.stats.kstwobign`.

    Example:
        >>> round(critical_value(1000), 4), round(critical_value(50, 0.01), 3)
        (0.043, 0.231)
    """
    # Rounded, so that a computed level such as 0.1 + 0.05 finds its entry.
    coefficient = _CRITICAL_COEFFICIENTS.get(round(float(significance), 12))
    if coefficient is None:
        from scipy.stats import kstwobign

        coefficient = float(kstwobign.isf(significance))
    return coefficient / math.sqrt(k)


@checked(_RULES)
def lilliefors_p_value(ks_distance: float, k: int) -> float:
    """Return how often K values of a true power law lie at least this far from their own fit.

    Monte Carlo with a fixed seed: 9999 samples of K values go through the very statistic of
    `fit_power_law`, smallest value as cutoff and exponent fitted, so p = (1 + number of
    distances >= ``ks_distance``) / 10000. The resolution, and the smallest p, is 0.0001; the
    Monte Carlo standard error is sqrt(p (1 - p) / 9999), 0.0022 at p = 0.05. The null
    distribution of each K is simulated once per process. Above K = 2000 that of 2000 is scaled
    by sqrt(2000 / K), which moves p by less than 0.005.

    The p-value knows nothing of a cutoff chosen for its small distance (`optimal_cutoff`).

    Args:
        ks_distance: d_ks of a power law fitted to the same K values.
        k: K, at least 2.

    Raises:
        ValueError: ``k`` is below 2, or the distance is not between 0 and 1.

    Source: Lilliefors 1969.

    Example:
        >>> round(lilliefors_p_value(0.108, 100), 2)  # Stephens' table (JASA 69, 1974): 0.05
        0.05
    """
    if k < 2:
        raise ValueError(f"k={k}: a fitted distance needs at least 2 values.")
    simulated = min(k, _LARGEST_SIMULATED)
    if simulated < k:
        ks_distance = ks_distance * math.sqrt(k / simulated)
    null = _null_distances(simulated)
    at_least = len(null) - int(np.searchsorted(null, ks_distance, side="left"))
    return (1 + at_least) / (1 + len(null))


def exponential_distances(logs: FloatArray) -> FloatArray:
    """Return the KS distance of each row of [..., K] from the exponential of the row's mean.

    Rows are ascending. The empirical distribution jumps from (i - 1) / K to i / K at the i-th
    value, and the distance is looked for on both sides of every jump, which with tied values
    still gives the supremum.
    """
    k = logs.shape[-1]
    above = -np.expm1(-logs / logs.mean(axis=-1, keepdims=True))
    above -= np.arange(1, k + 1) / k
    found: FloatArray = np.maximum(-above.min(axis=-1), above.max(axis=-1) + 1.0 / k)
    return found


@lru_cache(maxsize=128)
def _null_distances(k: int) -> FloatArray:
    """Return 9999 sorted KS distances of K power-law values from their own fit."""
    rng = np.random.default_rng((_NULL_SEED, k))
    # The gaps between ascending exponential values are independent exponentials divided by the
    # number of values still above (Renyi): samples come sorted, from their minimum on.
    num_above = np.arange(k - 1, 0, -1, dtype=np.float64)
    distances = np.empty(_NUM_SIMULATIONS)
    rows = max(1, _CHUNK // k)
    for start in range(0, _NUM_SIMULATIONS, rows):
        stop = min(start + rows, _NUM_SIMULATIONS)
        logs = np.zeros((stop - start, k))
        gaps = rng.standard_exponential((stop - start, k - 1)) / num_above
        np.cumsum(gaps, axis=1, out=logs[:, 1:])
        distances[start:stop] = exponential_distances(logs)
    distances.sort()
    distances.flags.writeable = False
    return distances

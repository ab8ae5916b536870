"""P-values of several tests, corrected for their number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import FloatArray


def holm(p_values: ArrayLike) -> FloatArray:
    """Return p-values adjusted by Holm: below 0.05, at most 5 % to err even once.

    Args:
        p_values: The p-values [m]; a NaN stays NaN and is no test.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    found = np.full(len(p), np.nan)
    found[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return found


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Return q-values: of the tests with q below 0.05, at most 5 % are expected to be wrong.

    `scipy.stats.false_discovery_control`, which takes no NaN.

    Args:
        p_values: The p-values [m]; a NaN stays NaN and is no test.

    Source: Benjamini and Hochberg, Journal of the Royal Statistical Society B 57, 1995.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]
    """
    from scipy.stats import false_discovery_control

    p = np.asarray(p_values, dtype=np.float64)
    tested = np.isfinite(p)
    found = np.full(len(p), np.nan)
    if tested.any():
        found[tested] = false_discovery_control(p[tested])
    return found

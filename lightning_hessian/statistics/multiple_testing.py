"""P-values of several tests, corrected for their number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import FloatArray


def holm(p_values: ArrayLike) -> FloatArray:
    """Returns p-values adjusted by Holm: below 0.05, at most 5 % to err even once.

    Args:
        p_values: The p-values [m]; a NaN stays NaN and is no test.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    return _adjusted(p_values, lambda p: np.maximum.accumulate(p * np.arange(len(p), 0, -1)))


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Returns q-values: of the tests with q below 0.05, at most 5 % are expected to be wrong.

    Args:
        p_values: The p-values [m]; a NaN stays NaN and is no test.

    Source: Benjamini and Hochberg, Journal of the Royal Statistical Society B 57, 1995.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]
    """

    def adjust(p: FloatArray) -> FloatArray:
        scaled = p * len(p) / np.arange(1, len(p) + 1)
        return np.minimum.accumulate(scaled[::-1])[::-1]

    return _adjusted(p_values, adjust)


def _adjusted(p_values: ArrayLike, adjust) -> FloatArray:  # type: ignore[no-untyped-def]
    p = np.asarray(p_values, dtype=np.float64)
    found = np.full(len(p), np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    found[order] = np.minimum(adjust(p[order]), 1.0)
    return found

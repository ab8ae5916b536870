"""The noise scale of gradients: how large a batch has to be before its noise stops to matter."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results.gradients import NoiseScale

LEAST = 3
"""Mini-batches of a pass: a variance needs two, and the jackknife leaves one out."""

_TOLD_FROM_ZERO = 2.0  # standard errors


def noise_scale(squares: ArrayLike, sums: ArrayLike, batch_size: float) -> NoiseScale:
    """Return Tr(C) / norm(g)^2 at batch size 1, from the gradients of mini-batches.

    With k gradients of a pass, batches without a common sample, the mean of ``g_s . g_t`` over
    s != t is the squared norm of the true gradient without bias; the squared norm of their mean is
    too large by Tr(C) / k. ``sum norm(g_t - mean)^2 / (k - 1)`` is the trace of the covariance at
    batch size B, and B times that the one at batch size 1. Of several passes over the same samples
    both are means over the passes.

    The standard error is that of a ratio (delta method), from the covariance of numerator and
    denominator that the jackknife over the mini-batches of a pass gives. Passes are not
    independent, so that the mean of their variances is kept: it is not too small.

    Args:
        squares: ``norm(g_t)^2``, [passes, k], k of at least `LEAST`.
        sums: ``g_t . sum of g_s`` over the k gradients of the same pass, [passes, k].
        batch_size: Samples in a mini-batch; where they differ, their harmonic mean, with which the
            trace has no bias either.

    Source: McCandlish, Kaplan, Amodei and the OpenAI Dota Team, An Empirical Model of Large-Batch
    Training, 2018 (arXiv 1812.06162), equation 2.9 and appendix A.1.

    Example:
        >>> gradients = np.array([[2.0, 1.0], [2.0, -1.0], [3.0, 0.0], [1.0, 0.0]])
        >>> gram = gradients @ gradients.T
        >>> found = noise_scale([gram.diagonal()], [gram.sum(axis=1)], batch_size=8)
        >>> round(found.trace, 3), round(found.squared_norm, 3)
        (10.667, 3.667)
    """
    square = np.asarray(squares, dtype=np.float64)
    summed = np.asarray(sums, dtype=np.float64)
    count = square.shape[1]
    if count < LEAST:
        raise ValueError(
            f"A pass has {count} mini-batches; the noise scale needs {LEAST}. Lower batch_size, or "
            "bring more data."
        )
    total_of_squares = square.sum(axis=1, keepdims=True)
    total = summed.sum(axis=1, keepdims=True)
    whole = _unbiased(total_of_squares, total, count)[:, :, 0].mean(axis=1)
    # One gradient less: its products with the others, twice, and with itself.
    left = _unbiased(total_of_squares - square, total - 2 * summed + square, count - 1)
    off = left - left.mean(axis=2, keepdims=True)
    covariance = (count - 1) / count * np.einsum("ipt,jpt->ijp", off, off).mean(axis=2)
    scale = np.array([batch_size, 1.0])
    trace, squared_norm = (scale * whole).tolist()
    covariance *= np.outer(scale, scale)
    error_of_norm = float(np.sqrt(covariance[1, 1]))
    found = NoiseScale(
        value=None,
        std_error=None,
        trace=trace,
        squared_norm=squared_norm,
        squared_norm_std_error=error_of_norm,
    )
    if not squared_norm > _TOLD_FROM_ZERO * error_of_norm:
        return found.without(
            "the squared norm of the mean gradient cannot be told from zero: it is below two of "
            "its standard errors. Take more gradients, or larger batches."
        )
    slope = np.array([1.0 / squared_norm, -trace / squared_norm**2])
    error = float(np.sqrt(max(0.0, slope @ covariance @ slope)))
    return found.with_value(trace / squared_norm, error)


def _unbiased(squares: np.ndarray, total: np.ndarray, count: int) -> np.ndarray:
    """Return the trace of the covariance and the squared norm of the gradient, [2, ...].

    Args:
        squares: The sum of norm(g_t)^2.
        total: The squared norm of the sum of g_t.
        count: How many gradients these are of.
    """
    return np.stack(
        [(squares - total / count) / (count - 1), (total - squares) / (count * (count - 1))]
    )

"""Records of the structure of stochastic gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_hessian.results.base import FloatArray
from lightning_hessian.results.shown import Shown

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class SortedMagnitudes:
    """The magnitudes of one column or one row of G, by rank: a line of SG's figures 1 and 3.

    Attributes:
        index: Which gradient of the T, or which parameter of the n.
        values: The largest magnitudes that are not zero, descending, float64; 100,000 at most.
        num_entries: How many entries there are, zeros and all.
    """

    index: int
    values: FloatArray
    num_entries: int


@dataclass(frozen=True, eq=False)
class RowTests:
    """Power-law and Gaussian tests of many rows of numbers: one line of SG's tables 1, 4 and 5.

    Attributes:
        ks_distances: d_ks of the power law fitted to the K largest magnitudes of each row,
            float64 [R]; NaN where fewer than K are not zero, or all K are equal.
        critical_value: d_c of K values at ``significance``.
        p_values: Those of D'Agostino and Pearson's test of each row, float64 [R]; NaN where its
            drawn points are all equal.
        num_values: K.
        num_points: How many points of each row were drawn for the Gaussian test.
        significance: Level of both tests.
        typical: The magnitudes of the row whose KS distance is the median of all; None where no
            row has a distance.
    """

    ks_distances: FloatArray
    critical_value: float
    p_values: FloatArray
    num_values: int
    num_points: int
    significance: float
    typical: SortedMagnitudes | None = None

    @property
    def num_ks_tested(self) -> int:
        """How many rows have a KS distance."""
        return int(np.isfinite(self.ks_distances).sum())

    @property
    def num_gaussian_tested(self) -> int:
        """How many rows have a p-value."""
        return int(np.isfinite(self.p_values).sum())

    @property
    def mean_ks_distance(self) -> float:
        """Mean d_ks over the rows that have one; NaN if none has."""
        return _mean(self.ks_distances, self.ks_distances)

    @property
    def power_law_rate(self) -> float:
        """Share of the rows with a KS distance whose distance is below ``critical_value``."""
        return _mean(self.ks_distances < self.critical_value, self.ks_distances)

    @property
    def mean_p_value(self) -> float:
        """Mean p over the rows that have one; NaN if none has."""
        return _mean(self.p_values, self.p_values)

    @property
    def gaussian_rate(self) -> float:
        """Share of the rows with a p-value that are not rejected: p >= ``significance``."""
        return _mean(self.p_values >= self.significance, self.p_values)


def _mean(values: NDArray[np.generic], known: FloatArray) -> float:
    """Return the mean of the values whose entry in ``known`` is finite, NaN if none is."""
    chosen = values[np.isfinite(known)].astype(np.float64)
    return float(chosen.mean()) if len(chosen) else float("nan")


@dataclass(frozen=True)
class NoiseScale:
    """How noisy the gradients of single samples are beside their mean (McCandlish et al. 2018).

    Attributes:
        value: Tr(C) / norm(g)^2 with the covariance C of single samples and the mean gradient g
            of the distribution that they are drawn from; None where it cannot be told.
        std_error: Its standard error; None with it.
        trace: Tr(C) at batch size 1, without bias; NaN where it is not known.
        squared_norm: norm(g)^2 without bias, which may be negative; NaN where it is not known.
        squared_norm_std_error: Its standard error; NaN likewise.
        reason: Why there is no value; None where there is.
    """

    value: float | None
    std_error: float | None
    trace: float
    squared_norm: float
    squared_norm_std_error: float
    reason: str | None = None

    @property
    def critical_batch_size(self) -> int | None:
        """The batch size that the noise scale suggests, a whole number of samples, at least 1.

        At it a run takes twice the fewest steps and twice the fewest samples, where the Hessian is
        a multiple of the identity. Source: McCandlish et al. 2018, equations 2.9 and 2.12.
        """
        return None if self.value is None else max(1, round(self.value))

    def with_value(self, value: float, std_error: float) -> NoiseScale:
        """Return the same with a value."""
        return replace(self, value=value, std_error=std_error)

    def without(self, reason: str) -> NoiseScale:
        """Return the same without a value, for a reason."""
        return replace(self, value=None, std_error=None, reason=reason)

    @classmethod
    def absent(cls, reason: str) -> NoiseScale:
        """Return the record where nothing is known."""
        nan = float("nan")
        return cls(None, None, nan, nan, nan, reason)


@dataclass(frozen=True, eq=False, repr=False)
class GradientStructure(Shown):
    """The structure of stochastic gradients at fixed parameters (SG).

    Attributes:
        covariance: Largest eigenvalues of C = sum (g_t - g)(g_t - g)^T / (T - 1) with g the mean
            of the T gradients, float64 [K_c], descending; exact to rounding.
        second_moment: Likewise of M = sum g_t g_t^T / T, float64 [K_m].
        covariance_trace: Tr(C), of all eigenvalues.
        second_moment_trace: Tr(M).
        mean_gradient_norm: norm(g).
        dimension_tests: Tests of the gradients, each over its dimensions (SG's columns of G);
            ``None`` where tests were not asked for.
        iteration_tests: Tests of the parameters, each over the iterations (SG's rows of G).
        loss: Mean loss over the mini-batches.
        num_parameters: n.
        num_gradients: T; fewer than asked for where time ran out.
        batch_size: B, ``None`` where batches were taken as they were given.
        num_computed: Gradients computed; more than T where memory did not hold them all.
        seconds: Wall time of the measurement.
        engine: ``"autograd"``, or ``"vmap"`` for per-sample gradients.
        dtype: Precision of the gradients, for example ``"float32"``.
        noise_scale: Tr(C) / norm(g)^2 at batch size 1, or why there is none.
        eigenvectors: First eigenvectors of C, orthonormal rows [k, n]; only when asked for.
    """

    covariance: FloatArray
    second_moment: FloatArray
    covariance_trace: float
    second_moment_trace: float
    mean_gradient_norm: float
    dimension_tests: RowTests | None
    iteration_tests: RowTests | None
    loss: float
    num_parameters: int
    num_gradients: int
    batch_size: int | None
    num_computed: int
    seconds: float
    engine: str
    dtype: str
    noise_scale: NoiseScale
    eigenvectors: torch.Tensor | None = None

    def plot(self, ax: Axes | None = None, *, entries: bool = False) -> Axes:
        """Draw the spectra, or the sorted magnitudes of the gradients' entries, log-log.

        Args:
            ax: Where to draw; by default axes of a new pyplot figure.
            entries: The entries of one gradient over dimensions, and of one parameter over
                iterations, those of median KS distance (SG figures 1, 3); needs ``tests=True``.

        Returns:
            The matplotlib axes.

        Raises:
            ValueError: No eigenvalue stands above rounding, or the entries were not tested.
        """
        return self._on(ax, entries=entries)

    @property
    def rounding(self) -> float:
        """What the rounding of the gradients adds to an eigenvalue of C, about."""
        eps = float(np.finfo(self.dtype).eps)
        return max(eps**2, float(np.finfo(np.float64).eps)) * self.second_moment_trace

    @property
    def leading(self) -> FloatArray:
        """The eigenvalues of C that stand above the rounding of the gradients.

        Gradients rounded to a relative eps add eigenvalues of about eps^2 Tr(M). Power laws are
        fitted to what lies above ten times that.
        """
        return self.covariance[self.covariance > 10 * self.rounding]

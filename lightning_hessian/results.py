"""The frozen records that travel from room to room, and the errors that a measurement raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.float64]


class MeasurementError(RuntimeError):
    """A measurement could not be made; the message names the cause and the remedy."""


@dataclass(frozen=True, eq=False)
class HessianSpectrum:
    """The top of a Hessian spectrum, with what is needed to judge it.

    Attributes:
        eigenvalues: Ritz values, float64 [K], descending.
        residuals: Bounds on ``norm(H u - lambda u)``, float64 [K]; a true eigenvalue lies within
            ``residuals[i]`` of ``eigenvalues[i]``.
        converged: bool [K], ``residuals <= tol * abs(eigenvalues)``.
        trace: Estimate of Tr(H), ``None`` where it was not asked for or time ran out.
        trace_std_error: Standard error of ``trace``; 0 where the trace is exact.
        lambda_min: The smallest eigenvalue, ``None`` where it had not converged.
        loss: Mean loss over the probe samples.
        num_parameters: n, the order of H.
        num_samples: Sum of the weights of the probe batches.
        num_hvps: Hessian-vector products (passes over all probe batches) spent.
        seconds: Wall time of the measurement.
        engine: Which engine computed the products.
        dtype: Precision of the products, for example ``"float32"``.
        eigenvectors: [K, n], rows in the order of ``eigenvalues``; only when asked for.
    """

    eigenvalues: FloatArray
    residuals: FloatArray
    converged: NDArray[np.bool_]
    trace: float | None
    trace_std_error: float | None
    lambda_min: float | None
    loss: float
    num_parameters: int
    num_samples: float
    num_hvps: int
    seconds: float
    engine: str
    dtype: str
    eigenvectors: torch.Tensor | None = None

    @property
    def num_converged(self) -> int:
        """How many of the eigenvalues have converged."""
        return int(self.converged.sum())

    @property
    def leading(self) -> FloatArray:
        """The eigenvalues before the first that has not converged or is not positive.

        Power laws are fitted to these, so that no gap in the ranks enters a fit.
        """
        usable = self.converged & (self.eigenvalues > 0)
        return self.eigenvalues[: len(usable) if usable.all() else int(usable.argmin())]


@dataclass(frozen=True)
class PowerLawFit:
    """A power law p(x) ~ x^-beta fitted to the K largest values, with its goodness of fit.

    Attributes:
        exponent: beta, the maximum-likelihood exponent (HPL eq. 16).
        exponent_std_error: (beta - 1) / sqrt(K) (Clauset et al. 2009).
        slope: s = 1 / (beta - 1), the exponent of Zipf's law (HPL eq. 3).
        ks_distance: d_ks, Kolmogorov-Smirnov distance between fit and data (HPL eq. 15).
        critical_value: d_c at ``significance`` (HPL table 6); that of a fully specified
            distribution, hence too kind to a fitted one.
        is_power_law: ``ks_distance < critical_value`` (HPL section 2.3).
        p_value: That of the same distance when the exponent comes from the same data
            (Lilliefors' test for the exponential distribution, on the logarithms).
        cutoff: The smallest value fitted.
        num_values: K.
        significance: Level of ``critical_value``.
    """

    exponent: float
    exponent_std_error: float
    slope: float
    ks_distance: float
    critical_value: float
    is_power_law: bool
    p_value: float
    cutoff: float
    num_values: int
    significance: float


@dataclass(frozen=True, eq=False)
class Eigengaps:
    """The gaps between neighbouring eigenvalues, fitted both ways (HPL eq. 11, figure 2).

    Attributes:
        gaps: delta_k = lambda_k - lambda_{k+1}, float64 [K - 1], in the order of the eigenvalues.
        fit: Power law of the gaps re-sorted by size (figure 2b; HPL tables 7, "Eigengap").
        rank_slope: Least-squares slope magnitude of log delta_k against log k in the original
            order (figure 2a); about s + 1 by HPL eq. 13.
        rank_slope_std_error: Its standard error.
        num_zero: Gaps that are exactly zero and were left out of both fits.
    """

    gaps: FloatArray
    fit: PowerLawFit
    rank_slope: float
    rank_slope_std_error: float
    num_zero: int


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """A spectral density as a quadrature rule: the mean of f over the eigenvalues, for smooth f.

    mean f = sum_k ``weights[k] f(nodes[k])``; with all eigenvalues as nodes it is exact.

    Attributes:
        nodes: float64 [k].
        weights: Not negative, their sum is 1, float64 [k].
        size: Order n of the operator.
        num_products: Products spent.
        exact: Whether the nodes are all n eigenvalues.
    """

    nodes: FloatArray
    weights: FloatArray
    size: int
    num_products: int
    exact: bool

    def moment(self, power: int) -> float:
        """Returns the mean of lambda^power; trace / n for 1, squared Frobenius norm / n for 2."""
        return float(self.weights @ self.nodes**power)

    def on_grid(self, grid: FloatArray, width: float) -> FloatArray:
        """Returns the density on a grid [G], each node broadened to a Gaussian.

        Args:
            grid: Where to evaluate, [G].
            width: Standard deviation of the Gaussian.
        """
        distance = (np.asarray(grid)[:, None] - self.nodes) / width
        return np.exp(-0.5 * distance**2) @ self.weights / (width * np.sqrt(2 * np.pi))


@dataclass(frozen=True, eq=False)
class BlockStructure:
    """Frobenius norms of all blocks H_ij of a Hessian, and what follows from them.

    Attributes:
        names: Names of the blocks [B].
        groups: The layer that each block is cut from [B].
        sizes: Number of parameters of each block [B].
        frobenius: norm_F(H_ij), float64 [B, B], symmetric.
        std_error: Their standard errors [B, B]; 0 where exact.
        off_diagonal_ratio: Mean over i != j of norm_F(H_ij) over mean over i of norm_F(H_ii)
            (HBS); None for one block, or where the diagonal is zero.
        off_diagonal_ratio_std_error: Its standard error.
        off_diagonal_share: Share of the squared norm of H outside the diagonal blocks; None
            where H is zero.
        off_diagonal_share_std_error: Its standard error.
        exact: Whether all columns of H were computed.
        stopped: Why no more probes were made: ``"exact"``, ``"converged"``, ``"bound"`` or
            ``"interrupted"``.
        densities: Spectral densities of the diagonal blocks [B]; None where they were not asked
            for or did not fit the bounds.
        heterogeneity: Jensen-Shannon distances between them, float64 [B, B], or None.
        loss: Mean loss over the probe samples.
        num_samples: Sum of the weights of the probe batches.
        num_hvps: Hessian-vector products (passes over all probe batches) spent.
        seconds: Wall time of the measurement.
        engine: Which engine computed the products.
        dtype: Precision of the products.
        matrix: H itself, block after block, [n, n]; only when asked for.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    frobenius: FloatArray
    std_error: FloatArray
    off_diagonal_ratio: float | None
    off_diagonal_ratio_std_error: float | None
    off_diagonal_share: float | None
    off_diagonal_share_std_error: float | None
    exact: bool
    stopped: str
    densities: tuple[SpectralDensity, ...] | None
    heterogeneity: FloatArray | None
    loss: float
    num_samples: float
    num_hvps: int
    seconds: float
    engine: str
    dtype: str
    matrix: FloatArray | None = None

    @property
    def ratios(self) -> FloatArray:
        """r_ij = norm_F(H_ij) / norm_F(H_ii), [B, B]; NaN where the diagonal block is zero."""
        diagonal = np.diagonal(self.frobenius)[:, None]
        out = np.full_like(self.frobenius, np.nan)
        return np.divide(self.frobenius, diagonal, where=diagonal > 0, out=out)

    @property
    def mean_heterogeneity(self) -> float | None:
        """Mean of the Jensen-Shannon distances over pairs of blocks; None where there are none."""
        if self.heterogeneity is None or len(self.names) < 2:
            return None
        return float(self.heterogeneity[np.triu_indices(len(self.names), 1)].mean())

    @property
    def families(self) -> dict[tuple[str, str], float]:
        """Share of the squared norm of H in the blocks between each pair of groups.

        Both triangles are counted, so that the shares add up to 1. For the two layers of a
        one-hidden-layer network these are H_ww, H_wv and H_vv, of which training makes the
        middle one vanish (HBS, dynamic force).
        """
        squared = np.square(self.frobenius)
        found: dict[tuple[str, str], float] = {}
        order = list(dict.fromkeys(self.groups))
        member = np.array([order.index(group) for group in self.groups])
        for a, first in enumerate(order):
            for b, second in enumerate(order[a:], start=a):
                part = squared[np.ix_(member == a, member == b)].sum()
                found[first, second] = float(part * (1 if a == b else 2) / squared.sum())
        return found

    def group_ratio(self, group: str) -> float | None:
        """Returns the off-diagonal ratio among the blocks of one group alone (HBS, theorem 2).

        Raises:
            ValueError: There is no such group.
        """
        member = np.array([name == group for name in self.groups])
        if not member.any():
            known = ", ".join(dict.fromkeys(self.groups))
            raise ValueError(f"There is no group {group!r}; the groups are {known}.")
        inside = self.frobenius[np.ix_(member, member)]
        count, on = len(inside), float(np.trace(inside))
        if count < 2 or on <= 0:
            return None
        return float(inside.sum() - on) / (count - 1) / on


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
    """

    ks_distances: FloatArray
    critical_value: float
    p_values: FloatArray
    num_values: int
    num_points: int
    significance: float

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
    """Returns the mean of the values whose entry in ``known`` is finite, NaN if none is."""
    chosen = values[np.isfinite(known)].astype(np.float64)
    return float(chosen.mean()) if len(chosen) else float("nan")


@dataclass(frozen=True, eq=False)
class GradientStructure:
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
    eigenvectors: torch.Tensor | None = None

    @property
    def leading(self) -> FloatArray:
        """The eigenvalues of C that stand above the rounding of the gradients.

        Gradients rounded to a relative eps add eigenvalues of about eps^2 Tr(M). Power laws are
        fitted to what lies above ten times that.
        """
        eps = float(np.finfo(self.dtype).eps)
        floor = 10 * max(eps**2, float(np.finfo(np.float64).eps)) * self.second_moment_trace
        return self.covariance[self.covariance > floor]

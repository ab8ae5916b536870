"""Records of spectra, of the laws fitted to them, and of spectral densities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hessian.results.base import ArgumentError, FloatArray
from lightning_hessian.results.shown import Shown

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class HessianSpectrum(Shown):
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
        protocol: ``"converged"``, or ``"pooled_slq"``: then ``eigenvalues`` are the Ritz values
            of several runs in one list, of which many are copies of one eigenvalue and many of
            none, as in the papers.
        num_runs: Of ``"pooled_slq"``; else 1.
        num_copies: How many of ``eigenvalues`` are further copies of one that another run has
            found too (both converged, and apart by no more than their bounds); 0 but for
            ``"pooled_slq"``.
        density: The density of the whole spectrum; only when asked for, and time was left.
        matrix_kind: Of which matrix these are the eigenvalues (and H above stands for):
            ``"hessian"`` or ``"gauss_newton"``, the argument ``matrix``.
        trace_of_square: Estimate of Tr(H^2), the sum of the squared eigenvalues and the square of
            the Frobenius norm, from the products of ``trace``.
        trace_of_square_std_error: Its standard error; 0 where it is exact.
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
    protocol: str = "converged"
    num_runs: int = 1
    num_copies: int = 0
    density: SpectralDensity | None = None
    matrix_kind: str = "hessian"
    trace_of_square: float | None = None
    trace_of_square_std_error: float | None = None

    @property
    def num_converged(self) -> int:
        """How many of the eigenvalues have converged."""
        return int(self.converged.sum())

    @property
    def leading(self) -> FloatArray:
        """The values that power laws are fitted to.

        The eigenvalues before the first that has not converged or is not positive, so that no gap
        in the ranks enters a fit. Under ``"pooled_slq"``, as in the papers, all that are positive.
        """
        if self.protocol == "pooled_slq":
            return self.eigenvalues[self.eigenvalues > 0]
        usable = self.converged & (self.eigenvalues > 0)
        return self.eigenvalues[: len(usable) if usable.all() else int(usable.argmin())]

    @property
    def leading_residuals(self) -> FloatArray:
        """The residual bounds of ``leading``, as `eigengaps` takes them.

        Under ``"pooled_slq"`` they are 0 where a Ritz value has not converged: the papers fit the
        gaps of all, and only two that have converged can be told to be copies.
        """
        if self.protocol == "pooled_slq":
            known = np.where(self.converged, self.residuals, 0.0)
            return known[self.eigenvalues > 0]
        return self.residuals[: len(self.leading)]

    def effective_dimension(self, scale: float) -> float:
        """Return N_eff = sum lambda / (lambda + scale) over the positive eigenvalues.

        It counts the directions in which the loss is more curved than ``scale``; with the precision
        of a Gaussian prior as the scale, the parameters that the data determine. With a density
        it is over the whole spectrum, and estimated as that is: a scale far below what the density
        resolves near zero comes out too low. Without one it is over ``leading`` alone, and so a
        lower bound.

        Args:
            scale: c > 0, a curvature, in units of the eigenvalues.

        Raises:
            ArgumentError: A scale that is not above 0.

        Sources: MacKay 1992, "Bayesian interpolation"; Maddox, Benton, Wilson 2020
        (arXiv 2003.02139), for negative eigenvalues, which are left out.

        Example:
            >>> import torch
            >>> from lightning_hessian import hessian_spectrum
            >>> model, batch = torch.nn.Linear(3, 1, bias=False), (torch.eye(3), torch.zeros(3, 1))
            >>> def loss_fn(model, batch):
            ...     return (model(batch[0]) - batch[1]).square().mean()
            >>> spectrum = hessian_spectrum(model, loss_fn, [batch], num_eigenvalues=3)
            >>> round(spectrum.effective_dimension(2 / 3), 6)  # three eigenvalues of 2 / 3
            1.5
        """
        if self.density is not None:
            return self.density.effective_dimension(scale)
        return float(_share_above(self.leading, scale).sum())


def _share_above(eigenvalues: FloatArray, scale: float) -> FloatArray:
    """Return lambda / (lambda + scale) of positive eigenvalues, 0 of others."""
    if not (isinstance(scale, (int, float)) and 0 < scale < np.inf):
        raise ArgumentError("scale", scale, "Give a curvature above 0.")
    positive = np.maximum(eigenvalues, 0.0)
    return positive / (positive + scale)


@dataclass(frozen=True)
class Alternative:
    """Another distribution above the same cutoff, and how much less likely it makes the values.

    Attributes:
        name: ``"lognormal"``, ``"truncated_power_law"`` (p(x) ~ x^-alpha exp(-Lambda x)) or
            ``"exponential"`` (p(x) ~ exp(-Lambda x)).
        log_likelihood_ratio: Vuong's statistic R / (sigma sqrt(K)): R is the sum over the values
            of ln p_power_law(x) - ln p_alternative(x), sigma the standard deviation of these
            terms. Positive: the power law is likelier; negative: the alternative is. None where
            the comparison failed.
        p_value: How often chance alone gives a ratio so far from 0, if both are equally good: a
            small one says that the sign can be relied on, a large one that the values do not
            decide. None where the comparison failed.
        parameters: The maximum-likelihood parameters, by powerlaw's names: ``mu`` and ``sigma``
            of the logarithms, ``alpha``, ``Lambda``. Where the optimizer did not converge, those
            where it stopped.
        reason: Why there is no ratio, one sentence; None where there is one.

    The power law is a case of two of them: the truncated one at Lambda = 0, and the limit of
    lognormals as -mu and sigma grow. Against these two the ratio is never positive, but for what
    the optimizer leaves, and a power law does as well as it can where the ratio is about 0 and p
    is large. For the truncated one p is that of 2 abs(R) under chi-squared with one degree of
    freedom, up to twice too large, since Lambda = 0 is the end of its range. Of a true power law
    many lognormal fits find no end on the way to that limit (18 % at 50 values, 63 % at 1000);
    ``reason`` says so.

    Sources: Clauset et al. 2009, section 5 and appendix C; Vuong 1989.
    """

    name: str
    log_likelihood_ratio: float | None
    p_value: float | None
    parameters: dict[str, float] = field(hash=False)
    reason: str | None = None


@dataclass(frozen=True, repr=False)
class PowerLawFit(Shown):
    """A power law p(x) ~ x^-beta fitted to the K largest values, with its goodness of fit.

    Attributes:
        exponent: beta, the maximum-likelihood exponent (HPL eq. 16).
        exponent_std_error: (beta - 1) / sqrt(K) (Clauset et al. 2009).
        slope: s = 1 / (beta - 1), the exponent of Zipf's law (HPL eq. 3).
        ks_distance: d_ks, Kolmogorov-Smirnov distance between fit and data (HPL eq. 15).
        critical_value: d_c at ``significance`` (HPL table 6); that of a fully specified
            distribution, hence too kind to a fitted one.
        is_power_law: ``ks_distance < critical_value`` (HPL section 2.3); None where there are too
            few values for a verdict.
        p_value: That of the same distance when the exponent comes from the same data
            (Lilliefors' test for the exponential distribution, on the logarithms).
        cutoff: The smallest value fitted.
        num_values: K.
        significance: Level of ``critical_value``.
        reason: Why there is no verdict, one sentence; None where there is one.
        alternatives: Other distributions held against the power law; empty where
            `fit_power_law` was not asked for them.
    """

    exponent: float
    exponent_std_error: float
    slope: float
    ks_distance: float
    critical_value: float
    is_power_law: bool | None
    p_value: float
    cutoff: float
    num_values: int
    significance: float
    reason: str | None = None
    alternatives: tuple[Alternative, ...] = ()

    def plot(self, ax: Axes | None = None, *, values: ArrayLike | None = None) -> Axes:
        """Draw the line by rank, and the band in which values keep within the critical distance.

        Args:
            ax: Where to draw; by default axes of a new pyplot figure.
            values: The values that were fitted, drawn over it: they are not part of the fit.

        Returns:
            The matplotlib axes.
        """
        return self._on(ax, values=values)


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
        num_below_bounds: Gaps that are not zero, but no larger than the two residual bounds
            together, and were left out too: they may be rounding between copies of a repeated
            eigenvalue.
        fitted: Which gaps the fits rest on, bool [K - 1].
    """

    gaps: FloatArray
    fit: PowerLawFit
    rank_slope: float
    rank_slope_std_error: float
    num_zero: int
    num_below_bounds: int
    fitted: NDArray[np.bool_]


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
        """Return the mean of lambda^power; trace / n for 1, squared Frobenius norm / n for 2."""
        return float(self.weights @ self.nodes**power)

    def effective_dimension(self, scale: float) -> float:
        """Return N_eff = sum lambda / (lambda + scale) over all positive eigenvalues.

        See `HessianSpectrum.effective_dimension`.

        Raises:
            ArgumentError: A scale that is not above 0.
        """
        return float(self.size * (self.weights @ _share_above(self.nodes, scale)))

    def on_grid(self, grid: FloatArray, width: float) -> FloatArray:
        """Return the density on a grid [G], each node broadened to a Gaussian.

        Args:
            grid: Where to evaluate, [G].
            width: Standard deviation of the Gaussian.
        """
        distance = (np.asarray(grid)[:, None] - self.nodes) / width
        found: FloatArray = np.exp(-0.5 * distance**2) @ self.weights / (width * np.sqrt(2 * np.pi))
        return found

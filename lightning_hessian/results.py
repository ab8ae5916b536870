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

"""The record of a block structure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_hessian.results.base import FloatArray
from lightning_hessian.results.shown import Shown
from lightning_hessian.results.spectrum import SpectralDensity


@dataclass(frozen=True, eq=False, repr=False)
class BlockStructure(Shown):
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
        matrix_kind: Of which matrix these are the blocks (and H above stands for): ``"hessian"`` or
            ``"gauss_newton"``, the argument ``matrix``.
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
    matrix_kind: str = "hessian"

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
        middle one vanish (HBS, dynamic force). Empty where H is zero, as it is with the squared
        error where no neuron is active: there are no shares of nothing.
        """
        squared = np.square(self.frobenius)
        found: dict[tuple[str, str], float] = {}
        if not squared.any():
            return found
        order = list(dict.fromkeys(self.groups))
        member = np.array([order.index(group) for group in self.groups])
        for a, first in enumerate(order):
            for b, second in enumerate(order[a:], start=a):
                part = squared[np.ix_(member == a, member == b)].sum()
                found[first, second] = float(part * (1 if a == b else 2) / squared.sum())
        return found

    def group_ratio(self, group: str) -> float | None:
        """Return the off-diagonal ratio among the blocks of one group alone (HBS, theorem 2).

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
        # Not the sum less the trace, which rounding can leave below zero.
        off = float(inside[~np.eye(count, dtype=bool)].sum())
        return off / (count - 1) / on

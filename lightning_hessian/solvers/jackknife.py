"""Norms, ratio and share of blocks from samples of their columns, by the jackknife."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hessian.results import FloatArray

_LEAST_DEGREES = 12
"""Degrees of freedom that the standard error of a ratio must have to be relied on."""

_PRIOR_DEGREES = 4
"""Weight of the mean relative variance in the standard error of an entry."""


class BlockEstimate:
    """Norms, ratio and share with their standard errors, from exact columns and probed ones.

    An entry of the squared norms is ``weight[i, j] column[i, j] + weight[j, i] column[j, i]``:
    halves where both columns are of one kind, all of the exact one otherwise. The jackknife
    leaves out one probe at a time, and shows how every norm changes. Arrays of changes are
    [k, B, B]: by probe, row and column; zero where a column has had fewer probes.
    """

    def __init__(
        self,
        exact_squares: FloatArray,
        samples: Sequence[Sequence[FloatArray]],
        dense: NDArray[np.bool_],
    ) -> None:
        self.dense = dense
        self.counts = np.array([len(column) for column in samples])
        values = np.zeros((self.counts.max(), *exact_squares.shape))
        for j, column in enumerate(samples):
            if column:
                values[: len(column), :, j] = column
        self.taken = np.arange(len(values))[:, None] < self.counts  # [k, B]
        means = values.sum(0) / np.maximum(1, self.counts)
        weight = np.where(dense[:, None] == dense, 0.5, np.where(dense, 1.0, 0.0))
        halves = weight * np.where(dense, exact_squares, means)
        self.squared = halves + halves.T
        # Leaving out one probe of column j changes the entries (i, j) and (j, i) by this much.
        np.fill_diagonal(weight, 1.0)
        left_out = (means - values) / np.maximum(1, self.counts - 1) * weight
        self.change_squared = np.where(self.taken[:, None], left_out, 0.0)
        root = np.sqrt(self.squared)
        self.change = np.sqrt(np.maximum(self.squared + self.change_squared, 0)) - root
        excess = self.change.sum(0) * (self.counts - 1) / np.maximum(1, self.counts)
        self.frobenius = root - _symmetric(excess)
        self.std_error = self.frobenius * np.sqrt(self._relative_variance())
        self.weight = weight

    def _relative_variance(self) -> FloatArray:
        """Return the squared standard errors over the squared norms, [B, B].

        With few probes the variance of one entry is known badly. A relative variance does not
        differ much between entries (for one probe it lies between 0 and 2 for any matrix), so
        each is drawn to the mean of its kind, as if that had been seen `_PRIOR_DEGREES` times.
        """
        squared = np.square(self.frobenius)
        own: FloatArray = np.zeros_like(squared)
        np.divide(_symmetric(self._variance(self.change)), squared, where=squared > 0, out=own)
        probed = ~(self.dense[:, None] | self.dense) & (squared > 0)
        on_diagonal = np.eye(len(squared), dtype=bool)
        degrees = _symmetric(np.broadcast_to(self.counts - 1, own.shape))
        for kind in (on_diagonal & probed, ~on_diagonal & probed):
            if kind.any():
                total = degrees[kind] * own[kind] + _PRIOR_DEGREES * own[kind].mean()
                own[kind] = total / (degrees[kind] + _PRIOR_DEGREES)
        return own

    def _variance(self, changes: FloatArray) -> FloatArray:
        """Return the jackknife variance over the probes, the first axis, for [k, ..., B]."""
        counts = np.maximum(1, self.counts)
        taken = self.taken if changes.ndim == 2 else self.taken[:, None]
        spread = np.where(taken, changes - (changes * taken).sum(0) / counts, 0.0)
        found: FloatArray = (counts - 1) / counts * np.square(spread).sum(0)
        return found

    def is_known_to(self, rel_error: float) -> bool:
        """Return whether the ratio is known well enough, and its error too; or there is no ratio.

        Where few columns make the ratio, few probes make its error: its degrees of freedom are
        counted by Satterthwaite's rule.
        """
        ratio, error = self.ratio()
        if ratio is None or error is None or error == 0:
            return True
        variance = self._expected_variance() / np.maximum(1, self.counts)
        degrees = variance.sum() ** 2 / (variance**2 / np.maximum(1, self.counts - 1)).sum()
        return error <= rel_error * ratio and bool(degrees >= _LEAST_DEGREES)

    def worth_more(self, max_probes: int) -> list[int]:
        """Return the probed columns on which a further probe is worth most, the best first.

        At most a quarter of them, each at least a quarter as worth while as the best.
        """
        gain = self._expected_variance() / np.maximum(1, self.counts * (self.counts + 1))
        gain[self.counts >= max_probes] = 0
        best = np.argsort(-gain, kind="stable")[: -(-np.count_nonzero(~self.dense) // 4)]
        return [int(j) for j in best if gain[j] > 0 and gain[j] >= gain.max() / 4]

    def _expected_variance(self) -> FloatArray:
        """Return what one probe on each column adds to the variance of the ratio, up to a factor.

        Judged by the norms, not by the scatter of the samples: else columns whose scatter is small
        by chance would be left alone, and the error look small.
        """
        ratio = self.ratio()[0] or 0.0
        shares = self.weight * self.frobenius
        on = np.diagonal(shares)
        weights = 2 * (shares.sum(0) - on) / max(1, len(shares) - 1) + ratio * on
        return np.where(self.dense, 0.0, np.square(weights))

    def ratio(self) -> tuple[float | None, float | None]:
        """Return the mean off the diagonal over the mean on it, with its standard error."""
        size = len(self.frobenius)
        on = float(np.trace(self.frobenius))
        if size == 1 or on <= 0:
            return None, None
        # Not the sum less the trace, which rounding can leave below zero.
        off = float(self.frobenius[~np.eye(size, dtype=bool)].sum())
        d_on, d_off = _on_and_off(self.change)
        leaving_out = (off + d_off) / (on + d_on) / (size - 1)
        return off / on / (size - 1), float(np.sqrt(self._variance(leaving_out).sum()))

    def share(self) -> tuple[float | None, float | None]:
        """Return the share of the squared norm off the diagonal, with its standard error."""
        on, total = float(np.trace(self.squared)), float(self.squared.sum())
        if total <= 0:
            return None, None
        d_on, d_off = _on_and_off(self.change_squared)
        leaving_out = 1 - (on + d_on) / (total + d_on + d_off)
        return 1 - on / total, float(np.sqrt(self._variance(leaving_out).sum()))


def _symmetric(by_column: FloatArray) -> FloatArray:
    """Return the sum of what the columns i and j do to an entry; on the diagonal they are one."""
    total: FloatArray = by_column + by_column.T
    np.fill_diagonal(total, np.diagonal(by_column))
    return total


def _on_and_off(change: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return by how much each probe changes the sums on and off the diagonal, [k, B] each."""
    on = np.diagonal(change, axis1=1, axis2=2)
    return on, 2 * (change.sum(1) - on)

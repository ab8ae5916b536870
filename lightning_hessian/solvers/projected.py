"""The projected problem of a Lanczos run, in float64 on the CPU, and bounds of its residuals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.linear.ranks import Ranks

ROUNDING_MARGIN = 4
"""Residual bounds carry the measured rounding times this: what was seen is not all there is."""

_LARGE = 1024
"""From this order on, a tridiagonal problem is solved as such."""

_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Ritz:
    """Ritz pairs of a basis of m vectors: the lowest one, and the top ones in ascending order.

    Attributes:
        values: Ritz values [t].
        rotation: Their vectors in the basis [m, t].
        outside: What the pending vectors take of their residuals [t].
        rounding: What measured rounding adds [t].
    """

    values: Tensor
    rotation: Tensor
    outside: Tensor
    rounding: Tensor

    @property
    def residuals(self) -> Tensor:
        """Bounds on the residual norms [t]."""
        return torch.hypot(self.outside, ROUNDING_MARGIN * self.rounding)


class Projected:
    """V^T A V as it was measured, step by step, and its departure from the recurrence.

    Both are kept in one matrix: the coefficients measured at step j in column j (upper triangle),
    and in row j (strict lower triangle) how far they were from what the recurrence says. The
    residual of a Ritz vector V s is what the pending vectors take of it, minus V (lower) s.

    Attributes:
        count: Order m.
        numbers: That matrix, [m, m] and room for more.
        rounded: Residuals of kept Ritz vectors by rounding, which the recurrence no longer shows.
        off_diagonal: The coefficients beside the diagonal by the recurrence [m - 1], as long as
            there are no others; else None.

    Args:
        tridiagonal_from: The order from which on a tridiagonal problem is solved as such.
    """

    def __init__(self, *, tridiagonal_from: int = _LARGE) -> None:
        self.tridiagonal_from = tridiagonal_from
        self.count = 0
        self.numbers = torch.zeros(0, 0, dtype=torch.float64)
        self.rounded = torch.zeros(0, dtype=torch.float64)
        self.off_diagonal: list[float] | None = []

    def add(self, column: Tensor, expected: Tensor) -> None:
        """Take the coefficients measured at a step [m + 1], and those that were expected [m]."""
        j = self.count
        if j == len(self.numbers):
            self._grow(max(64, j + j // 4))
        self.numbers[: j + 1, j] = column
        self.numbers[j, :j] = column[:j] - expected
        if self.off_diagonal is not None and j:
            self.off_diagonal.append(float(expected[-1]))
            if bool(expected[:-1].any()):
                self.off_diagonal = None
        self.count = j + 1

    def lose(self, coupling: Tensor) -> None:
        """Count as rounding what products with the basis vectors hold outside it, at most [m]."""
        before = torch.zeros_like(coupling)
        before[: len(self.rounded)] = self.rounded
        self.rounded = torch.hypot(before, coupling.abs())

    def restart(self, values: Tensor, rounding: Tensor) -> None:
        """Begin anew with Ritz vectors as the basis."""
        k = self.count = len(values)
        self.numbers = torch.zeros(k, k, dtype=torch.float64)
        self.numbers[range(k), range(k)] = values
        self.rounded = rounding.clone()
        self.off_diagonal = None

    def compress(self, rotation: Tensor) -> None:
        """Go over to fewer vectors, combinations of those there are with weights [m, k]."""
        m = self.count
        upper = torch.triu(self.numbers[:m, :m])
        whole = upper + torch.triu(upper, 1).T
        squared = (torch.tril(self.numbers[:m, :m], -1) @ rotation).square_().sum(0)
        squared += self.rounded.square() @ rotation[: len(self.rounded)].square()
        self.numbers = torch.triu(rotation.T @ whole @ rotation)
        self.rounded = squared.sqrt_()
        self.count = rotation.shape[1]
        self.off_diagonal = None

    def _grow(self, size: int) -> None:
        old, self.numbers = self.numbers, torch.zeros(size, size, dtype=torch.float64)
        self.numbers[: len(old), : len(old)] = old

    @property
    def is_tridiagonal(self) -> bool:
        """Whether the problem is large, and tridiagonal but for rounding."""
        return self.off_diagonal is not None and self.count >= self.tridiagonal_from

    def solve(
        self, couplings: list[Tensor], top: int, *, eps: float, scale: float, ranks: Ranks
    ) -> Ritz:
        """Return the lowest and the ``top`` largest Ritz pairs, all m if there are no more.

        A large problem is solved as a tridiagonal one (by relatively robust representations) as
        long as it is one: at m = 2000, measured, in 0.4 s instead of 1 to 5.

        Args:
            couplings: How the products lean on each pending vector, [m] each.
            top: How many.
            eps: Of the precision of the vectors.
            scale: An estimate of the norm of the operator.
            ranks: Who must come to the same result.
        """
        m = self.count
        values, rotation = self._eigenpairs(min(top, m))
        values, rotation = ranks.broadcast(values), ranks.broadcast(rotation)
        outside = torch.zeros(len(values), dtype=torch.float64)
        for coupling in couplings:
            outside += (coupling @ rotation).abs()
        squared = self._departure(rotation)
        squared += self.rounded.square() @ rotation[: len(self.rounded)].square()
        # What storing a vector costs, and what the projected problem costs in float64.
        stored, solved = eps * values, torch.finfo(torch.float64).eps * scale
        return Ritz(values, rotation, outside, (squared + stored.square() + solved**2).sqrt())

    def _eigenpairs(self, top: int) -> tuple[Tensor, Tensor]:
        m = self.count
        if self.is_tridiagonal and self.off_diagonal is not None:
            from scipy.linalg import eigh_tridiagonal

            diagonal = self.numbers.diagonal()[:m].numpy()
            beside = np.array(self.off_diagonal)
            ends = [(0, 0), (m - top, m - 1)] if top < m else [(0, m - 1)]
            found = [
                eigh_tridiagonal(diagonal, beside, select="i", select_range=end) for end in ends
            ]
            values = np.concatenate([pair[0] for pair in found])
            rotation = np.concatenate([pair[1] for pair in found], axis=1)
            return torch.from_numpy(values), torch.from_numpy(rotation)
        values, rotation = torch.linalg.eigh(self.numbers[:m, :m], UPLO="U")
        if top >= m - 1:
            return values, rotation
        chosen = torch.tensor([0, *range(m - top, m)])
        return values[chosen], rotation[:, chosen]

    def _departure(self, rotation: Tensor) -> Tensor:
        """Return the squared norms of (departure) s for the columns s of a rotation [m, t].

        The symmetric problem mirrors what was measured above the diagonal, so that it departs from
        the recurrence below; the tridiagonal one takes the recurrence's, and departs above.
        """
        m = self.count
        if not self.is_tridiagonal:
            squared = torch.zeros(rotation.shape[1], dtype=torch.float64)
            for start in range(0, m, _BLOCK):
                stop = min(start + _BLOCK, m)
                lower = torch.tril(self.numbers[start:stop, :stop], diagonal=start - 1)
                squared += (lower @ rotation[:stop]).square_().sum(0)
            return squared
        total = torch.zeros_like(rotation)
        for start in range(0, m, _BLOCK):
            stop = min(start + _BLOCK, m)
            lower = torch.tril(self.numbers[start:stop, :stop], diagonal=start - 1)
            total[:stop].addmm_(lower.T, rotation[start:stop])
        return total.square_().sum(0)

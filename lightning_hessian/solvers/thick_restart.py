"""One run of thick-restart Lanczos: its state, and the steps that lead from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.operators.linear import SymmetricOperator, check_finite
from lightning_hessian.results import FloatArray
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.projected import ROUNDING_MARGIN, Projected, Ritz
from lightning_hessian.solvers.storage import BasisStorage

_STORED_ROUNDING = 2.0**-9
"""Relative error of a number rounded to bfloat16, at most."""


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs at the top of a spectrum, and the lowest eigenvalue.

    Attributes:
        values: Ritz values, float64 [K], descending.
        residuals: Bounds on the residual norms, float64 [K].
        converged: ``residuals <= tol * abs(values)``, bool [K].
        vectors: Orthonormal Ritz vectors, this rank's part [K, n_local], where the basis was and
            in its precision; they share its memory.
        lowest: The lowest Ritz value.
        lowest_residual: Its residual bound.
        num_products: Products with the operator, those before an interruption included.
        stopped: Why the iteration ended: ``"converged"``, ``"exhausted"`` (the whole space was
            searched), ``"precision"`` (what has not converged is held up by rounding),
            ``"memory"`` (a basis that cannot restart is full), ``"bound"`` or ``"interrupted"``.
    """

    values: FloatArray
    residuals: FloatArray
    converged: NDArray[np.bool_]
    vectors: Tensor
    lowest: float
    lowest_residual: float
    num_products: int
    stopped: str


@dataclass
class Pending:
    """A unit vector orthogonal to the basis that is to join it.

    ``coupling`` says how the products with the basis vectors lean on it: A v_i = (what lies in
    the basis) + coupling[i] * vector + (the same for the other pending vectors).
    """

    vector: Tensor
    coupling: Tensor


class ThickRestart:
    """The state of a run between steps; see `lanczos` for the arguments."""

    def __init__(
        self,
        operator: SymmetricOperator,
        wanted: int,
        tol: float,
        capacity: int,
        seed: int,
        storage: BasisStorage,
    ) -> None:
        self.operator = operator
        self.shard = operator.shard
        self.wanted = wanted
        self.tol = tol
        self.seed = seed
        self.storage = storage
        self.basis = KrylovBasis(
            capacity, self.shard, dtype=operator.dtype, device=operator.device, storage=storage
        )
        self.eps = torch.finfo(operator.dtype).eps
        self.generator = torch.Generator().manual_seed(seed)
        # Where vectors are rounded, what is measured with them is less exact than the recurrence.
        self.projected = Projected() if storage.restarts else Projected(tridiagonal_from=0)
        self.pending: list[Pending] = []
        self.scale = 0.0  # largest coefficient so far, an estimate of the norm of the operator
        self.num_products = 0
        self.next_check = wanted + 2
        self.found: RitzPairs | None = None  # what a search for more is under way to confirm
        self.search_until = 0  # products
        self.between_steps = True
        self.on_check: Callable[[int], None] | None = None  # told how many have converged

    @property
    def count(self) -> int:
        """Vectors in the basis; their products are known."""
        return self.projected.count

    def run(
        self,
        max_products: int,
        num_checks: int | None,
        should_stop: Callable[[], bool] | None,
        after_step: Callable[[], Any] | None,
        on_stop: Callable[[], Any],
    ) -> RitzPairs:
        """Iterates until converged, searches for missed copies, and returns the pairs.

        Args:
            max_products: Bound on products.
            num_checks: Steps of the search, or None.
            should_stop: Asked after every product.
            after_step: Called after every product.
            on_stop: Called before a run that could go on is ended by a bound or interrupted.
        """
        if not self.pending and not self.count:
            self.pending.append(self._random())
        last = self.num_products >= max_products  # taken up again with a bound that is reached
        interrupted = False
        while True:
            if not (last or self._is_due()):
                self._step()
                if after_step is not None:
                    after_step()
                interrupted = should_stop is not None and should_stop()
                last = interrupted or self.num_products >= max_products
            if last or self._is_due():
                ended = self._check(last, interrupted, num_checks, on_stop)
                if ended is not None:
                    return ended

    def _is_due(self) -> bool:
        """Whether the projected problem is to be solved before the next step."""
        return self.count == self.basis.capacity or self.count >= self.next_check

    def _check(
        self, last: bool, interrupted: bool, num_checks: int | None, on_stop: Callable[[], Any]
    ) -> RitzPairs | None:
        """Solves the projected problem; returns the pairs where this is the end."""
        full = self.count == self.basis.capacity
        ritz = self._ritz(self._restart_size() if full else self.wanted)
        if self.on_check is not None:
            self.on_check(self._num_converged(ritz))
        if self.found is not None:
            if not self._has_more(ritz, self.found):
                over = last or self.num_products >= self.search_until
                if over or self.count == self.operator.size:
                    return dataclasses.replace(self.found, num_products=self.num_products)
                self._restart_search()
                self._plan_search()
                return None
            self.found = None
        stopped = self._verdict(ritz)
        if stopped is None and full and not last and not self.storage.restarts:
            stopped = "memory"
        if stopped is None and last:
            stopped = "interrupted" if interrupted else "bound"
            on_stop()
        if stopped in ("converged", "precision") and num_checks != 0 and not last:
            room = num_checks or max(10, self.num_products // 5)
            self._restart(ritz, self.wanted)  # so that what comes next is new
            self.found = self._result(ritz, stopped)
            self.pending.insert(0, self._random())
            self.search_until = self.num_products + room
            self._plan_search()
            return None
        if stopped is not None:
            self.basis.rotate(ritz.rotation[:, -self.wanted :].flip(1))
            return self._result(ritz, stopped)
        if full:
            self._restart(ritz, self._restart_size())
        self.next_check = self.count + max(5, self.count // 10)
        return None

    def _plan_search(self) -> None:
        """Sets the next check to the end of the search, or to where the basis is full."""
        left = self.search_until - self.num_products
        self.next_check = min(self.count + left, self.basis.capacity)

    def _step(self) -> None:
        """Takes a pending vector into the basis; the rest of its product becomes pending."""
        j = self.count
        joining = self.pending[0]
        if len(self.pending) > 1 and j:  # it has waited; restore what orthogonality it has lost
            self.basis.orthogonalize(joining.vector, j)
            joining.vector /= self.shard.norm(joining.vector)
        product = self.operator.matvec(joining.vector)
        self.between_steps = False
        self.num_products += 1
        expected = self._join(self.pending.pop(0))
        column, beta = self.basis.orthogonalize(product, j + 1)
        check_finite(column, beta, f"Product {self.num_products} with the operator")
        self.projected.add(column, expected)
        self.scale = max(self.scale, beta, float(column.abs().max()))
        if self.count == self.operator.size:
            self.pending.clear()
        elif beta > 10 * self.eps * self.scale:
            coupling = torch.zeros(self.count, dtype=torch.float64)
            coupling[j] = beta
            rest = Pending(product.div_(beta), coupling)
            # A search goes on from what is new; what is older waits until it has ended.
            self.pending.insert(0 if self.found is not None else len(self.pending), rest)
        elif not self.pending:
            self.pending.append(self._random())  # an invariant subspace
        self.between_steps = True

    def _join(self, joining: Pending) -> Tensor:
        """Puts a vector into the basis, and makes the pending ones orthogonal to it.

        Returns:
            The coefficients that its product is expected to have with the older vectors [j].
        """
        vector = joining.vector
        self.basis[self.count] = vector
        expected = joining.coupling.clone()
        waiting, self.pending = self.pending, []
        for other in waiting:
            overlap = float(self.shard.dot(other.vector, vector))
            expected += overlap * other.coupling
            other.vector.sub_(vector, alpha=overlap)
            left = float(self.shard.norm(other.vector))
            if left > 1e-3:  # else it lies in the basis, but for rounding
                coupling = torch.cat([left * other.coupling, torch.zeros(1, dtype=torch.float64)])
                self.pending.append(Pending(other.vector.div_(left), coupling))
        return expected

    def _random(self) -> Pending:
        """Returns a random unit vector orthogonal to the basis, which no product leans on."""
        vector = torch.randn(self.operator.size, generator=self.generator, dtype=torch.float64)
        vector = self.shard.take(vector).to(self.operator.device, self.operator.dtype)
        for _ in range(2):  # a second time after normalising, should little have been left
            if self.count:
                self.basis.orthogonalize(vector, self.count)
            vector /= self.shard.norm(vector)
        return Pending(vector, torch.zeros(self.count, dtype=torch.float64))

    def _ritz(self, top: int) -> Ritz:
        """Solves the projected problem and bounds the residuals."""
        return self.projected.solve(
            [pending.coupling for pending in self.pending], top,
            eps=self.eps, scale=self.scale, ranks=self.shard.ranks,
        )  # fmt: skip

    def _verdict(self, ritz: Ritz) -> str | None:
        """Returns why to stop, or None."""
        if self.count == self.operator.size:
            return "exhausted"
        if self.count < self.wanted:
            return None
        size = ritz.values[-self.wanted :].abs()
        residuals = ritz.residuals[-self.wanted :]
        converged = residuals <= self.tol * size
        if converged.all():
            return "converged"
        # More steps cannot bring a residual below what rounding leaves of it.
        floor = ROUNDING_MARGIN * ritz.rounding[-self.wanted :]
        floor = floor.clamp(min=self.eps * self.scale)
        if (converged | (residuals <= 2 * floor)).all():
            return "precision"
        return None

    def _num_converged(self, ritz: Ritz) -> int:
        """Returns how many of the wanted pairs have converged."""
        size = ritz.values[-self.wanted :].abs()
        return int((ritz.residuals[-self.wanted :] <= self.tol * size).sum())

    def _has_more(self, ritz: Ritz, found: RitzPairs) -> bool:
        """Whether a search has turned up a value above the smallest of those found."""
        values = torch.from_numpy(found.values[::-1].copy())
        allowed = torch.from_numpy(found.residuals[::-1].copy()) + self.tol * values.abs()
        return bool((ritz.values[-self.wanted :] > values + allowed).any())

    def _restart_size(self) -> int:
        """Returns how many Ritz vectors to keep: a third more than are wanted."""
        return self.wanted + max(0, self.count - self.wanted) // 3

    def _restart(self, ritz: Ritz, kept: int) -> None:
        """Keeps the best Ritz vectors and what is pending, and goes on from there.

        Args:
            ritz: The Ritz pairs.
            kept: How many of the best to keep.
        """
        m, given = self.count, len(ritz.values)
        kept = max(min(kept, m - 1, self.basis.capacity - 2), min(self.wanted, m - 1))
        keep = [*range(given - 1, given - 1 - kept, -1), 0]  # the lowest too, for lambda_min
        self.basis.rotate(ritz.rotation[:, keep])
        rounding = ritz.rounding[keep]
        if not self.storage.restarts:
            rounding = torch.hypot(
                rounding, torch.full_like(rounding, _STORED_ROUNDING * self.scale)
            )
        self.projected.restart(ritz.values[keep], rounding)
        for pending in self.pending:
            pending.coupling = pending.coupling @ ritz.rotation[:, keep]

    def _restart_search(self) -> None:
        """Makes room for a search to go on in a full basis; what was found stays as it is.

        The first rows are the wanted vectors and the lowest; of the space that the search has
        built beside them, the best third is kept.
        """
        fixed, m = self.wanted + 1, self.count
        _, rotation = torch.linalg.eigh(self.projected.numbers[fixed:m, fixed:m], UPLO="U")
        rotation = self.shard.ranks.agreed(rotation)
        kept = max(1, (m - fixed) // 3)
        whole = torch.zeros(m, fixed + kept, dtype=torch.float64)
        whole[range(fixed), range(fixed)] = 1
        whole[fixed:, fixed:] = rotation[:, -kept:].flip(1)
        self.basis.rotate(whole)
        self.projected.compress(whole)
        for pending in self.pending:
            pending.coupling = pending.coupling @ whole

    def _result(self, ritz: Ritz, stopped: str) -> RitzPairs:
        """Makes the record; the wanted vectors are the first rows of the basis."""
        values = ritz.values[-self.wanted :].flip(0)
        residuals = ritz.residuals[-self.wanted :].flip(0)
        return RitzPairs(
            values=values.numpy(),
            residuals=residuals.numpy(),
            converged=(residuals <= self.tol * values.abs()).numpy(),
            vectors=self.basis.rows[: len(values)],
            lowest=float(ritz.values[0]),
            lowest_residual=float(ritz.residuals[0]),
            num_products=self.num_products,
            stopped=stopped,
        )

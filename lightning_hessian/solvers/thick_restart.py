"""One run of thick-restart Lanczos: its state, and the steps that lead from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.solvers.krylov import KrylovState, Pending, RitzPairs
from lightning_hessian.solvers.projected import ROUNDING_MARGIN, Ritz
from lightning_hessian.solvers.search import make_room
from lightning_hessian.solvers.storage import BasisStorage

_STORED_ROUNDING = 2.0**-9
"""Relative error of a number rounded to bfloat16, at most."""

_LEAST_SEARCH, _SEARCH_PART = 10, 20
"""A search for missed copies takes so many steps, or this part of the products if that is more."""

_NEARLY_INSIDE = 0.1
"""A pending vector of which no more is left outside the basis is made orthogonal to it anew."""


class ThickRestart(KrylovState):
    """The state of a run between steps; see `lanczos` for the arguments."""

    def __init__(
        self,
        operator: SymmetricOperator,
        wanted: int,
        tol: float,
        capacity: int,
        seed: int,
        storage: BasisStorage,
        num_rows: int | None = None,
    ) -> None:
        super().__init__(operator, wanted, capacity, storage, num_rows)
        self.tol = tol
        self.seed = seed
        # Less than this of a unit vector is rounding: it is counted as such, not followed.
        self._negligible = 10 * self.eps if storage.restarts else _STORED_ROUNDING
        self.generator = torch.Generator().manual_seed(seed)
        self.num_products = 0
        self.next_check = wanted + 2
        self.found: RitzPairs | None = None  # what a search for more is under way to confirm
        self.search_until = 0  # products
        self.between_steps = True
        self.allowance: Allowance = UNBOUNDED

    def run(
        self,
        max_products: int,
        num_checks: int | None,
        allowance: Allowance,
        after_step: Callable[[], Any] | None,
        on_stop: Callable[[], Any],
    ) -> RitzPairs:
        """Iterate until converged, search for missed copies, and return the pairs.

        Args:
            max_products: Bound on products.
            num_checks: Steps of the search, or None.
            allowance: Asked after every product whether the time is up.
            after_step: Called after every product.
            on_stop: Called before a run that could go on is ended by a bound or interrupted.
        """
        self.allowance = allowance
        if not self.pending and not self.count:
            self.pending.append(self.random_vector())
        last = self.num_products >= max_products  # taken up again with a bound that is reached
        interrupted = False
        while not last or self._is_due():
            if not self._is_due():
                self._step()
                if after_step is not None:
                    after_step()
                interrupted = allowance.is_over()
                last = interrupted or self.num_products >= max_products
            if self._is_due():
                ended = self._check(num_checks)
                if ended is not None:
                    return ended
        on_stop()
        return self._so_far("interrupted" if interrupted else "bound")

    def _is_due(self) -> bool:
        """Return whether the projected problem is to be solved before the next step."""
        return self.count == self.capacity or self.count >= self.next_check

    def _check(self, num_checks: int | None) -> RitzPairs | None:
        """Solve the projected problem; returns the pairs where this is the end.

        Nothing here depends on bounds or interruptions, so that a run which is taken up again
        goes the way of one that was not interrupted.
        """
        full = self.count == self.capacity
        ritz = self._ritz(self._restart_size() if full else self.wanted)
        self.allowance.note_converged(int(self._converged(ritz).sum()))
        self.between_steps = False
        ended = self._ended(ritz, full, num_checks)
        self.between_steps = True
        return ended

    def _ended(self, ritz: Ritz, full: bool, num_checks: int | None) -> RitzPairs | None:
        """Go on by what a check has found, or returns the pairs."""
        if self.found is not None:
            if not self._has_more(ritz, self.found):
                if self.num_products >= self.search_until or self.count == self.operator.size:
                    counted = dataclasses.replace(self.found, num_products=self.num_products)
                    return self._with_traces(counted)
                make_room(self)
                self._plan_search()
                return None
            self.found = None
        stopped = self._verdict(ritz)
        if stopped is None and full and not self.storage.restarts:
            stopped = "memory"
        if stopped in ("converged", "precision") and num_checks != 0:
            room = num_checks or max(_LEAST_SEARCH, self.num_products // _SEARCH_PART)
            self._make_found_first(room)
            self.found = self._result(ritz, stopped)
            self.pending.insert(0, self.random_vector())
            self.search_until = self.num_products + room
            self._plan_search()
            return None
        if stopped is not None:
            self.basis.rotate(ritz.rotation[:, -self.wanted :].flip(1))
            return self._with_traces(self._result(ritz, stopped))
        if full:
            self._restart(ritz, self._restart_size())
        self.next_check = self.count + self._steps_to_check(ritz)
        return None

    def _steps_to_check(self, ritz: Ritz) -> int:
        """Return after how many steps to solve the projected problem again.

        The last few of the wanted pairs converge one after the other, each in two to five steps
        (measured on networks, K = 50). A hundredth of the steps at least, for a check costs time;
        a tenth at most, for what was estimated is none too sure.
        """
        missing = self.wanted - int(self._converged(ritz).sum())
        return max(1 + self.count // 100, min(2 * missing, max(5, self.count // 10)))

    def _so_far(self, stopped: str) -> RitzPairs:
        """Return the pairs of a run that ends before its time; it cannot go on afterwards."""
        ritz = self._ritz(self.wanted)
        self.allowance.note_converged(int(self._converged(ritz).sum()))
        if self.found is not None and not self._has_more(ritz, self.found):
            return dataclasses.replace(self.found, num_products=self.num_products, stopped=stopped)
        self.between_steps = False
        self.basis.rotate(ritz.rotation[:, -self.wanted :].flip(1))
        return self._result(ritz, stopped)

    def _with_traces(self, pairs: RitzPairs) -> RitzPairs:
        """Return the pairs with the traces of A and A^2 where the basis spanned the whole space.

        They are those of V^T A V for any orthonormal V, whatever has converged; vectors that are
        rounded when stored are not orthonormal enough to say so.
        """
        if self.count < self.operator.size or not self.storage.restarts:
            return pairs
        upper = self.projected.numbers[: self.count, : self.count].triu()
        diagonal = upper.diagonal()
        square = 2 * upper.square().sum() - diagonal.square().sum()
        return dataclasses.replace(
            pairs, trace=float(diagonal.sum()), trace_of_square=float(square)
        )

    def _make_found_first(self, room: int) -> None:
        """Restart before a search of so many steps: what was found becomes the first rows.

        As many of the next largest Ritz vectors stay as in any restart. What the search takes in
        is orthogonal to them, so that it need not find those values again, which lie close below
        the wanted ones: a copy that was missed stands out sooner.
        """
        kept = max(self.wanted, min(self._restart_size(), self.capacity - room - 2))
        self._restart(self._ritz(kept), kept)

    def _plan_search(self) -> None:
        """Set the next check to the end of the search, or to where the basis is full."""
        left = self.search_until - self.num_products
        self.next_check = min(self.count + left, self.capacity)

    def _step(self) -> None:
        """Take a pending vector into the basis; the rest of its product becomes pending."""
        j = self.count
        joining = self.pending[0]
        if len(self.pending) > 1 and j and not joining.is_fresh:
            # It has waited: restore what orthogonality it has lost, once.
            self.between_steps = False
            self.basis.orthogonalize(joining.vector, j)
            joining.vector /= self.shard.norm(joining.vector)
            joining.is_fresh = self.between_steps = True
        product = self.operator.matvec(joining.vector)
        self.between_steps = False
        self.num_products += 1
        expected = self._join(self.pending.pop(0))
        column, beta = self.basis.orthogonalize(product, j + 1)
        check_finite(column, beta, f"Product {self.num_products} with the operator")
        self.projected.add(column, expected)
        self.scale = max(self.scale, beta, float(column.abs().max()))
        coupling = torch.zeros(self.count, dtype=torch.float64)
        coupling[j] = beta
        if self.count == self.operator.size:
            self.pending.clear()
        elif beta > 10 * self.eps * self.scale:
            rest = Pending(product.div_(beta), coupling)
            # A search goes on from what is new; what is older waits until it has ended.
            self.pending.insert(0 if self.found is not None else len(self.pending), rest)
        else:
            self.projected.lose(coupling)
            if not self.pending:
                self.pending.append(self.random_vector())  # an invariant subspace
        self.between_steps = True

    def _join(self, joining: Pending) -> Tensor:
        """Put a vector into the basis, and make the pending ones orthogonal to it.

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
            coupling = torch.cat([left * other.coupling, torch.zeros(1, dtype=torch.float64)])
            if left <= self._negligible:
                self.projected.lose(coupling)
                continue
            other.vector.div_(left)
            if left < _NEARLY_INSIDE:  # then rounding, divided by little, is no longer little
                self.basis.orthogonalize(other.vector, self.count + 1)
                other.vector.div_(self.shard.norm(other.vector))
            self.pending.append(Pending(other.vector, coupling))
        return expected

    def random_vector(self) -> Pending:
        """Return a random unit vector orthogonal to the basis, which no product leans on."""
        vector = torch.randn(self.operator.size, generator=self.generator, dtype=torch.float64)
        vector = self.shard.take(vector).to(self.operator.device, self.operator.dtype)
        for _ in range(2):  # a second time after normalising, should little have been left
            if self.count:
                self.basis.orthogonalize(vector, self.count)
            vector /= self.shard.norm(vector)
        return Pending(vector, torch.zeros(self.count, dtype=torch.float64))

    def _ritz(self, top: int) -> Ritz:
        """Solve the projected problem and bounds the residuals."""
        couplings, ranks = [pending.coupling for pending in self.pending], self.shard.ranks
        return self.projected.solve(couplings, top, eps=self.eps, scale=self.scale, ranks=ranks)

    def _verdict(self, ritz: Ritz) -> str | None:
        """Return why to stop, or None."""
        if self.count == self.operator.size:
            return "exhausted"
        if self.count < self.wanted:
            return None
        converged = self._converged(ritz)
        if converged.all():
            return "converged"
        # More steps cannot bring a residual below what rounding leaves of it.
        floor = ROUNDING_MARGIN * ritz.rounding[-self.wanted :]
        floor = floor.clamp(min=self.eps * self.scale)
        if (converged | (ritz.residuals[-self.wanted :] <= 2 * floor)).all():
            return "precision"
        return None

    def _converged(self, ritz: Ritz) -> Tensor:
        """Return which of the wanted pairs have converged, the largest last."""
        top = slice(-self.wanted, None)
        return ritz.residuals[top] <= self.tol * ritz.values[top].abs()

    def _has_more(self, ritz: Ritz, found: RitzPairs) -> bool:
        """Return whether a search has turned up a value above the smallest of those found."""
        values = torch.from_numpy(found.values[::-1].copy())
        allowed = torch.from_numpy(found.residuals[::-1].copy()) + self.tol * values.abs()
        return bool((ritz.values[-self.wanted :] > values + allowed).any())

    def _restart_size(self) -> int:
        """Return how many Ritz vectors to keep: a third more than are wanted."""
        return self.wanted + max(0, self.count - self.wanted) // 3

    def _restart(self, ritz: Ritz, kept: int) -> None:
        """Keep the best Ritz vectors, so many, and what is pending, and go on from there."""
        m, given = self.count, len(ritz.values)
        kept = max(min(kept, m - 1, self.capacity - 2), min(self.wanted, m - 1))
        keep = [*range(given - 1, given - 1 - kept, -1), 0]  # the lowest too, for lambda_min
        self.basis.rotate(ritz.rotation[:, keep])
        rounding = ritz.rounding[keep]
        if not self.storage.restarts:
            rounding = torch.hypot(rounding, rounding.new_tensor(_STORED_ROUNDING * self.scale))
        self.projected.restart(ritz.values[keep], rounding)
        for pending in self.pending:
            pending.coupling = pending.coupling @ ritz.rotation[:, keep]
            pending.is_fresh = False

    def _result(self, ritz: Ritz, stopped: str) -> RitzPairs:
        """Make the record; the wanted vectors are the first rows of the basis."""
        values = ritz.values[-self.wanted :].flip(0)
        residuals = ritz.residuals[-self.wanted :].flip(0)
        return RitzPairs(
            values=values.numpy(),
            residuals=residuals.numpy(),
            converged=self._converged(ritz).flip(0).numpy(),
            vectors=self.basis.rows[: len(values)],
            lowest=float(ritz.values[0]),
            lowest_residual=float(ritz.residuals[0]),
            num_products=self.num_products,
            stopped=stopped,
        )

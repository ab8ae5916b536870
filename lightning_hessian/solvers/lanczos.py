"""Thick-restart Lanczos: the largest eigenvalues of a symmetric operator, with residuals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.operators.linear import SymmetricOperator
from lightning_hessian.results import FloatArray, MeasurementError
from lightning_hessian.solvers.basis import KrylovBasis, fitting_capacity

_ROUNDING_MARGIN = 4
"""Residual bounds carry the measured rounding times this: what was seen is not all there is."""


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs at the top of a spectrum, and the lowest eigenvalue.

    Attributes:
        values: Ritz values, float64 [K], descending.
        residuals: Bounds on the residual norms, float64 [K].
        converged: ``residuals <= tol * abs(values)``, bool [K].
        vectors: Orthonormal Ritz vectors [K, n].
        lowest: The lowest Ritz value.
        lowest_residual: Its residual bound.
        num_products: Products with the operator.
        stopped: Why the iteration ended: ``"converged"``, ``"exhausted"`` (the whole space was
            searched), ``"precision"`` (what has not converged is held up by rounding), ``"bound"``
            or ``"interrupted"``.
    """

    values: FloatArray
    residuals: FloatArray
    converged: NDArray[np.bool_]
    vectors: Tensor
    lowest: float
    lowest_residual: float
    num_products: int
    stopped: str


def lanczos(
    operator: SymmetricOperator,
    num_eigenvalues: int,
    *,
    tol: float = 1e-3,
    max_products: int | None = None,
    max_basis: int | None = None,
    num_checks: int | None = None,
    seed: int = 0,
    should_stop: Callable[[], bool] | None = None,
    on_check: Callable[[int], None] | None = None,
) -> RitzPairs:
    """Returns the K largest (algebraic) eigenvalues of an operator with their residual bounds.

    Lanczos with full reorthogonalisation and thick restart (Wu and Simon 2000). The projected
    problem is solved in float64 on the CPU, by torch's LAPACK: SciPy brings threads of its own,
    which fight torch's for the cores (three times slower steps on two cores).

    A Krylov space holds one vector of each eigenspace, so copies of a repeated eigenvalue appear
    late, by rounding. Therefore K converged pairs are not taken at their word: a search from a new
    random vector follows, and the result is final only if it turns up nothing larger.

    A residual bound adds up the classical Lanczos estimate and the measured departure of the
    products from symmetry and from the recurrence, so that it stays honest where rounding, not
    the number of steps, is the limit.

    Memory: ``max_basis + 2`` vectors. Work in a step: one product and 8 m n flops.

    Args:
        operator: Symmetric operator of order n.
        num_eigenvalues: K, at most n.
        tol: An eigenpair has converged at residual <= tol * abs(Ritz value).
        max_products: Bound on products; by default ``default_bound(K)``.
        max_basis: m, at most so many vectors are held before a restart; by default
            ``default_basis(K)``, or as many as fit half the free memory.
        num_checks: Steps of the search for missed copies; by default 10, or a fifth of the steps
            before it if that is more. 0 for no search; more where eigenvalues are known to repeat.
        seed: Of the start vector.
        should_stop: Asked after every product; True ends the iteration with what there is.
        on_check: Told now and then how many of the K have converged.

    Raises:
        ValueError: K is not in 1..n, or ``max_basis`` or ``max_products`` is too small for K.
        MeasurementError: A product is NaN or infinite, or no basis for K fits the memory.

    Example:
        >>> from lightning_hessian.operators.linear import MatrixOperator
        >>> matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
        >>> lanczos(MatrixOperator(matrix), 2).values.round(6)
        array([8., 7.])
    """
    size = operator.size
    if not 1 <= num_eigenvalues <= size:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues were asked of an operator of order {size}; "
            f"ask for 1 to {size}."
        )
    if max_products is None:
        max_products = default_bound(num_eigenvalues)
    if max_products < num_eigenvalues:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues need at least as many products; the bound is "
            f"{max_products}. Raise it or ask for fewer eigenvalues."
        )
    least = min(num_eigenvalues + 3, max_products, size)
    if max_basis is None:
        max_basis = min(default_basis(num_eigenvalues), max_products, size)
        max_basis = fitting_capacity(
            max_basis, least, size, dtype=operator.dtype, device=operator.device
        )
    max_basis = min(max_basis, max_products, size)
    if max_basis < least:
        raise ValueError(
            f"A basis of {max_basis} vectors is too small for {num_eigenvalues} eigenvalues; "
            f"it must hold at least {least}."
        )
    iteration = _Iteration(operator, num_eigenvalues, tol, max_basis, seed)
    return iteration.run(max_products, num_checks, should_stop, on_check)


def default_basis(num_eigenvalues: int) -> int:
    """Returns how many vectors are held before a restart."""
    return 4 * num_eigenvalues + 40


def default_bound(num_eigenvalues: int) -> int:
    """Returns how many products are spent at most."""
    return 40 * num_eigenvalues + 400


@dataclass
class _Pending:
    """A unit vector orthogonal to the basis that is to join it.

    ``coupling`` says how the products with the basis vectors lean on it: A v_i = (what lies in
    the basis) + coupling[i] * vector + (the same for the other pending vectors).
    """

    vector: Tensor
    coupling: Tensor


class _Iteration:
    """One run of thick-restart Lanczos; its state between steps.

    ``projected`` holds V^T A V from the coefficients measured at each step (upper triangle).
    ``departure`` holds, row by row, how far those were from what the recurrence says (its strict
    lower triangle): the residual of a Ritz vector V s is what the pending vectors take of it,
    minus V departure s.
    """

    def __init__(
        self, operator: SymmetricOperator, wanted: int, tol: float, max_basis: int, seed: int
    ) -> None:
        self.operator = operator
        self.wanted = wanted
        self.tol = tol
        self.capacity = max_basis
        self.basis = KrylovBasis(
            max_basis, operator.size, dtype=operator.dtype, device=operator.device
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.projected = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        self.departure = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        # Residuals of kept Ritz vectors by rounding, which the recurrence no longer shows.
        self.rounded = torch.zeros(max_basis, dtype=torch.float64)
        self.count = 0  # vectors in the basis; their products are known
        self.pending = [self._random()]
        self.scale = 0.0  # largest coefficient so far, an estimate of the norm of the operator
        self.num_products = 0
        self.searching = False

    def run(
        self,
        max_products: int,
        num_checks: int | None,
        should_stop: Callable[[], bool] | None,
        on_check: Callable[[int], None] | None = None,
    ) -> RitzPairs:
        """Iterates until converged, searches for missed copies, and returns the pairs."""
        next_check = self.wanted + 2
        found: RitzPairs | None = None  # what a search for more is under way to confirm
        while True:
            self._step()
            interrupted = should_stop is not None and should_stop()
            last = interrupted or self.num_products >= max_products
            full = self.count == self.capacity
            if not (last or full or self.count >= next_check):
                continue
            ritz = self._ritz()
            if on_check is not None:
                on_check(self._num_converged(ritz))
            if found is not None:
                if not self._has_more(ritz, found):
                    return dataclasses.replace(found, num_products=self.num_products)
                found, self.searching = None, False
            stopped = self._verdict(ritz)
            if stopped is None and last:
                stopped = "interrupted" if interrupted else "bound"
            if stopped in ("converged", "precision") and num_checks != 0 and not last:
                room = num_checks or max(10, self.num_products // 5)
                self._restart(ritz, only=self.wanted)  # so that what comes next is new
                found = self._result(ritz, stopped, self.basis.vectors[: self.count])
                self.pending.insert(0, self._random())
                self.searching = True
                next_check = min(self.count + room, self.capacity)
                continue
            if stopped is not None:
                self.basis.rotate(ritz.rotation[:, -self.wanted :])
                kept = min(self.wanted, self.count)
                return self._result(ritz, stopped, self.basis.vectors[:kept])
            if full:
                self._restart(ritz)
            next_check = self.count + max(5, self.count // 10)

    def _step(self) -> None:
        """Takes a pending vector into the basis; the rest of its product becomes pending."""
        j = self.count
        expected = self._join(self.pending.pop(0))
        product = self.operator.matvec(self.basis[j])
        self.num_products += 1
        coefficients, norm = self.basis.orthogonalize(product, j + 1)
        measured = torch.cat([coefficients, norm.reshape(1)]).to("cpu", torch.float64)
        if not measured.isfinite().all():
            raise MeasurementError(
                f"Product {self.num_products} with the operator is NaN or infinite. The gradient "
                "may overflow in this precision, or an operation has no finite second derivative."
            )
        column, beta = measured[:-1], float(measured[-1])
        self.projected[: j + 1, j] = self.projected[j, : j + 1] = column
        self.departure[j, :j] = column[:j] - expected
        self.scale = max(self.scale, beta, float(column.abs().max()))
        self.count = j + 1
        if self.count == self.operator.size:
            self.pending.clear()
        elif beta > 10 * torch.finfo(self.operator.dtype).eps * self.scale:
            coupling = torch.zeros(self.count, dtype=torch.float64)
            coupling[j] = beta
            rest = _Pending(product.div_(beta), coupling)
            # A search goes on from what is new; what is older waits until it has ended.
            self.pending.insert(0 if self.searching else len(self.pending), rest)
        elif not self.pending:
            self.pending.append(self._random())  # an invariant subspace

    def _join(self, joining: _Pending) -> Tensor:
        """Puts a pending vector into the basis, and makes the others orthogonal to it.

        Returns:
            The coefficients that its product is expected to have with the older vectors [j].
        """
        j = self.count
        vector = joining.vector
        if self.pending and j:  # it has waited; restore what orthogonality it has lost
            self.basis.orthogonalize(vector, j)
            vector /= torch.linalg.vector_norm(vector)
        self.basis.vectors[j] = vector
        expected = joining.coupling.clone()
        waiting = self.pending
        self.pending = []
        for other in waiting:
            overlap = float(other.vector @ vector)
            expected += overlap * other.coupling
            other.vector.sub_(vector, alpha=overlap)
            left = float(torch.linalg.vector_norm(other.vector))
            if left > 1e-3:  # else it lies in the basis, but for rounding
                coupling = torch.cat([left * other.coupling, torch.zeros(1, dtype=torch.float64)])
                self.pending.append(_Pending(other.vector.div_(left), coupling))
        return expected

    def _random(self) -> _Pending:
        """Returns a random unit vector orthogonal to the basis, which no product leans on."""
        vector = torch.randn(self.operator.size, generator=self.generator, dtype=torch.float64)
        vector = vector.to(self.operator.device, self.operator.dtype)
        for _ in range(2):  # a second time after normalising, should little have been left
            if self.count:
                self.basis.orthogonalize(vector, self.count)
            vector /= torch.linalg.vector_norm(vector)
        return _Pending(vector, torch.zeros(self.count, dtype=torch.float64))

    def _ritz(self) -> _Ritz:
        """Solves the projected problem and bounds the residuals."""
        m = self.count
        values, rotation = torch.linalg.eigh(self.projected[:m, :m])
        outside = torch.zeros(m, dtype=torch.float64)
        for pending in self.pending:
            outside += (pending.coupling @ rotation).abs()
        departed = self.departure[:m, :m] @ rotation
        rounded = self.rounded[:m, None] * rotation
        # What storing a vector costs, and what the projected problem costs in float64.
        stored = torch.finfo(self.operator.dtype).eps * values
        solved = torch.finfo(torch.float64).eps * self.scale
        rounding = (departed.square() + rounded.square()).sum(0)
        rounding = (rounding + stored.square() + solved**2).sqrt()
        return _Ritz(values, rotation, outside, rounding)

    def _verdict(self, ritz: _Ritz) -> str | None:
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
        floor = _ROUNDING_MARGIN * ritz.rounding[-self.wanted :]
        floor = floor.clamp(min=torch.finfo(self.operator.dtype).eps * self.scale)
        if (converged | (residuals <= 2 * floor)).all():
            return "precision"
        return None

    def _num_converged(self, ritz: _Ritz) -> int:
        """Returns how many of the wanted pairs have converged."""
        size = ritz.values[-self.wanted :].abs()
        return int((ritz.residuals[-self.wanted :] <= self.tol * size).sum())

    def _has_more(self, ritz: _Ritz, found: RitzPairs) -> bool:
        """Whether a search has turned up a value above the smallest of those found."""
        values = torch.from_numpy(found.values[::-1].copy())
        allowed = torch.from_numpy(found.residuals[::-1].copy()) + self.tol * values.abs()
        return bool((ritz.values[-self.wanted :] > values + allowed).any())

    def _restart(self, ritz: _Ritz, only: int | None = None) -> None:
        """Keeps the best Ritz vectors and what is pending, and goes on from there.

        Args:
            ritz: The Ritz pairs.
            only: How many of the best to keep; by default a third more than are wanted.
        """
        m = self.count
        kept = self.wanted + (m - self.wanted) // 3 if only is None else only
        kept = max(min(kept, m - 1, self.capacity - 2), min(self.wanted, m - 1))
        keep = [0, *range(m - kept, m)]  # the lowest too, for lambda_min
        self.basis.rotate(ritz.rotation[:, keep])
        self.count = k = len(keep)
        self.projected.zero_()
        self.departure.zero_()
        self.rounded.zero_()
        self.projected[range(k), range(k)] = ritz.values[keep]
        self.rounded[:k] = ritz.rounding[keep]
        for pending in self.pending:
            pending.coupling = pending.coupling @ ritz.rotation[:, keep]

    def _result(self, ritz: _Ritz, stopped: str, ascending: Tensor) -> RitzPairs:
        """Makes the record; the last rows of ``ascending`` are the wanted vectors."""
        values = ritz.values[-self.wanted :].flip(0)
        residuals = ritz.residuals[-self.wanted :].flip(0)
        return RitzPairs(
            values=values.numpy(),
            residuals=residuals.numpy(),
            converged=(residuals <= self.tol * values.abs()).numpy(),
            vectors=ascending[-len(values) :].flip(0),
            lowest=float(ritz.values[0]),
            lowest_residual=float(ritz.residuals[0]),
            num_products=self.num_products,
            stopped=stopped,
        )


@dataclass(frozen=True, eq=False)
class _Ritz:
    """All m Ritz pairs of a basis, ascending, and the two parts of their residual bounds."""

    values: Tensor
    rotation: Tensor
    outside: Tensor
    rounding: Tensor

    @property
    def residuals(self) -> Tensor:
        return torch.hypot(self.outside, _ROUNDING_MARGIN * self.rounding)

"""Thick-restart Lanczos: the largest eigenvalues of a symmetric operator, with residuals."""

from __future__ import annotations

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
    seed: int = 0,
    should_stop: Callable[[], bool] | None = None,
) -> RitzPairs:
    """Returns the K largest (algebraic) eigenvalues of an operator with their residual bounds.

    Lanczos with full reorthogonalisation and thick restart (Wu and Simon 2000). The projected
    problem is solved in float64 on the CPU, by torch's LAPACK: SciPy brings threads of its own,
    which fight torch's for the cores (three times slower steps on two cores).

    A residual bound adds up the classical Lanczos estimate and the measured departure of the
    products from symmetry and from the recurrence, so that it stays honest where rounding, not
    the number of steps, is the limit.

    Memory: ``max_basis + 1`` vectors. Work in a step: one product and 8 m n flops.

    Args:
        operator: Symmetric operator of order n.
        num_eigenvalues: K, at most n.
        tol: An eigenpair has converged at residual <= tol * abs(Ritz value).
        max_products: Bound on products; by default ``default_bound(K)``.
        max_basis: m, at most so many vectors are held before a restart; by default
            ``default_basis(K)``, or as many as fit half the free memory.
        seed: Of the start vector.
        should_stop: Asked after every product; True ends the iteration with what there is.

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
    return _Iteration(operator, num_eigenvalues, tol, max_basis, seed).run(
        max_products, should_stop
    )


def default_basis(num_eigenvalues: int) -> int:
    """Returns how many vectors are held before a restart."""
    return 4 * num_eigenvalues + 40


def default_bound(num_eigenvalues: int) -> int:
    """Returns how many products are spent at most."""
    return 40 * num_eigenvalues + 400


class _Iteration:
    """One run of thick-restart Lanczos; its state between steps.

    ``projected`` holds V^T A V from the coefficients measured at each step (upper triangle).
    ``departure`` holds, row by row, how far those were from what the recurrence says (its strict
    lower triangle): for the Ritz vector V s, the residual is beta s_m v_m+1 - V departure s.
    """

    def __init__(
        self, operator: SymmetricOperator, wanted: int, tol: float, max_basis: int, seed: int
    ) -> None:
        self.operator = operator
        self.wanted = wanted
        self.tol = tol
        self.capacity = max_basis
        self.basis = KrylovBasis(
            max_basis + 1, operator.size, dtype=operator.dtype, device=operator.device
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.projected = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        self.departure = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        # Residuals of kept Ritz vectors that the recurrence does not see.
        self.inherited = torch.zeros(max_basis, dtype=torch.float64)
        self.expected = torch.zeros(0, dtype=torch.float64)  # what the next step should find
        self.count = 0  # vectors whose product is known
        self.beta = 0.0
        self.scale = 0.0  # largest coefficient so far, an estimate of the norm of the operator
        self.num_products = 0

    def run(self, max_products: int, should_stop: Callable[[], bool] | None) -> RitzPairs:
        self._fill_random(0)
        next_check = self.wanted
        while True:
            self._step()
            interrupted = should_stop is not None and should_stop()
            last = interrupted or self.num_products >= max_products
            full = self.count == self.capacity
            if not (last or full or self.count >= next_check):
                continue
            values, rotation, residuals, rounding = self._ritz()
            stopped = self._verdict(values, residuals, rounding)
            if stopped is None and last:
                stopped = "interrupted" if interrupted else "bound"
            if stopped is not None:
                return self._result(values, rotation, residuals, stopped)
            if full:
                self._restart(values, rotation, rounding)
            next_check = self.count + max(5, self.count // 10)

    def _step(self) -> None:
        """Multiplies the newest vector and orthogonalises the product to make the next."""
        j = self.count
        product = self.operator.matvec(self.basis[j])
        self.num_products += 1
        coefficients, norm = self.basis.orthogonalize(product, j + 1)
        found = torch.cat([coefficients, norm.reshape(1)]).to("cpu", torch.float64)
        if not found.isfinite().all():
            raise MeasurementError(
                f"Product {self.num_products} with the operator is NaN or infinite. The gradient "
                "may overflow in this precision, or an operation has no finite second derivative."
            )
        column, self.beta = found[:-1], float(found[-1])
        self.projected[: j + 1, j] = self.projected[j, : j + 1] = column
        self.departure[j, :j] = column[:j] - self.expected
        self.scale = max(self.scale, self.beta, float(column.abs().max()))
        self.count = j + 1
        self.expected = torch.zeros(self.count, dtype=torch.float64)
        if self.count == self.operator.size:
            self.beta = 0.0
            return
        eps = torch.finfo(self.operator.dtype).eps
        if self.beta <= 10 * eps * self.scale:
            # An invariant subspace: nothing couples it to the rest, which is searched anew.
            self.beta = 0.0
            self._fill_random(self.count)
            return
        self.expected[j] = self.beta
        self.basis.vectors[self.count] = product.div_(self.beta)

    def _fill_random(self, index: int) -> None:
        """Puts a random unit vector orthogonal to the first ``index`` ones at that place."""
        vector = torch.randn(self.operator.size, generator=self.generator, dtype=torch.float64)
        vector = vector.to(self.operator.device, self.operator.dtype)
        for _ in range(2):  # a second time after normalising, should little have been left
            if index:
                self.basis.orthogonalize(vector, index)
            vector /= torch.linalg.vector_norm(vector)
        self.basis.vectors[index] = vector

    def _ritz(self) -> tuple[FloatArray, Tensor, FloatArray, FloatArray]:
        """Returns all Ritz values (ascending), coefficients, residual bounds and rounding parts."""
        m = self.count
        values, rotation = torch.linalg.eigh(self.projected[:m, :m])
        departed = self.departure[:m, :m] @ rotation
        inherited = self.inherited[:m, None] * rotation
        # What storing a vector costs, and what the projected problem costs in float64.
        stored = torch.finfo(self.operator.dtype).eps * values
        solved = torch.finfo(torch.float64).eps * self.scale
        rounding = (departed.square() + inherited.square()).sum(0)
        rounding = (rounding + stored.square() + solved**2).sqrt()
        outside = self.beta * rotation[-1]
        residuals = torch.hypot(outside, _ROUNDING_MARGIN * rounding)
        return values.numpy(), rotation, residuals.numpy(), rounding.numpy()

    def _verdict(
        self, values: FloatArray, residuals: FloatArray, rounding: FloatArray
    ) -> str | None:
        """Returns why to stop, or None."""
        if self.count == self.operator.size:
            return "exhausted"
        if self.count < self.wanted:
            return None
        top = slice(self.count - self.wanted, None)
        converged = residuals[top] <= self.tol * np.abs(values[top])
        if converged.all():
            return "converged"
        # More steps cannot bring a residual below what rounding leaves of it.
        floor = np.maximum(
            _ROUNDING_MARGIN * rounding[top], torch.finfo(self.operator.dtype).eps * self.scale
        )
        if (converged | (residuals[top] <= 2 * floor)).all():
            return "precision"
        return None

    def _restart(self, values: FloatArray, rotation: Tensor, rounding: FloatArray) -> None:
        """Keeps the best Ritz vectors and the newest basis vector, and goes on from there."""
        m = self.count
        kept = min(self.wanted + (m - self.wanted) // 3, m - 2)
        keep = np.r_[0, np.arange(m - kept, m)]  # the lowest too, for lambda_min
        newest = self.basis[m].clone()
        self.basis.rotate(rotation[:, keep])
        k = len(keep)
        self.basis.vectors[k] = newest
        self.projected.zero_()
        self.departure.zero_()
        self.projected[range(k), range(k)] = torch.from_numpy(values[keep])
        self.inherited.zero_()
        self.inherited[:k] = torch.from_numpy(rounding[keep])
        self.expected = self.beta * rotation[-1, keep]
        self.count = k

    def _result(
        self, values: FloatArray, rotation: Tensor, residuals: FloatArray, stopped: str
    ) -> RitzPairs:
        found = min(self.wanted, self.count)
        top = np.arange(self.count)[::-1][:found].copy()
        self.basis.rotate(rotation[:, top])
        return RitzPairs(
            values=values[top],
            residuals=residuals[top],
            converged=residuals[top] <= self.tol * np.abs(values[top]),
            vectors=self.basis.vectors[:found],
            lowest=float(values[0]),
            lowest_residual=float(residuals[0]),
            num_products=self.num_products,
            stopped=stopped,
        )

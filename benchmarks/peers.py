"""The libraries that are measured, each behind the same four methods.

All get a copy of the model, and attention on the one kernel that can be differentiated twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian import hessian_spectrum
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.operators.linearize.onednn import is_faster_here
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.solvers.lanczos import lanczos

Values = np.ndarray


def twice_differentiable() -> Any:
    """Open the block in which attention can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


class Ours:
    """lightning_hessian.

    Args:
        problem: What to measure.
        engine: Of the products; by default the linearised one that suits the processor.
    """

    name = "lightning_hessian"
    top_settings = "K = 10, tol = 1e-3, search for missed copies included"

    def __init__(self, problem: Problem, engine: str | None = None) -> None:
        self.problem = problem
        self.engine = engine or ("linearize_onednn" if is_faster_here() else "linearize")
        self._block: Any = None

    def start(self) -> Callable[[Tensor], Tensor]:
        """Build the operator, and return its product with a vector [n]."""
        space = ParameterSpace.select(self.problem.model)
        objective = Objective(self.problem.model, self.problem.loss_fn, self.problem.batches, space)
        self._block = objective.isolated()
        self._block.__enter__()
        objective.value()
        self.operator = HessianOperator(objective, self.engine)
        return self.operator.matvec

    def stop(self) -> None:
        """End what `start` began."""
        if self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None

    def top(self, count: int, tol: float) -> Values:
        """Return the largest eigenvalues, from the start: nothing is built before."""
        spectrum = hessian_spectrum(
            self.problem.model, self.problem.loss_fn, self.problem.batches,
            num_eigenvalues=count, tol=tol, trace_probes=0,
        )  # fmt: skip
        self.num_products = spectrum.num_hvps
        return spectrum.eigenvalues

    def lanczos(self, steps: int) -> Values:
        """Return the leading Ritz values of a run of so many steps with the operator."""
        found = lanczos(
            self.operator, steps // 4, tol=1e-12, max_products=steps, max_basis=steps,
            num_checks=0,
        )  # fmt: skip
        self.num_products = found.num_products
        return found.values


class HessianEigenthings:
    """hessian-eigenthings, the pre-release of 2026: rebuilt double backward, Lanczos."""

    name = "hessian-eigenthings"
    module = "hessian_eigenthings"
    top_settings = "lanczos(k=10, which='LA', reorthogonalize=True), the least max_iter that does"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def start(self) -> Callable[[Tensor], Tensor]:
        """Build the operator, and return its product with a vector [n]."""
        from hessian_eigenthings import HessianOperator as Operator

        model = copy.deepcopy(self.problem.model)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        self.operator = Operator(
            model, list(self.problem.batches), self.problem.loss_fn,
            param_filter=lambda name, parameter: name in names,
        )  # fmt: skip
        return self.operator.matvec

    def stop(self) -> None:
        """End what `start` began."""

    def steps_for(self, count: int, tol: float, matvec: Callable[[Tensor], Tensor]) -> int:
        """Return the least ``max_iter``, a multiple of ten, with which all converge.

        It is found with another product, and not timed: a user would have to guess it.
        """
        from hessian_eigenthings import LambdaOperator
        from hessian_eigenthings import lanczos as run

        operator = LambdaOperator(matvec, size=self.problem.size)
        for steps in range(20, 1000, 10):
            found = run(
                operator, k=count, max_iter=steps, tol=tol, reorthogonalize=True, which="LA",
                seed=0,
            )  # fmt: skip
            if bool(found.converged.all()):
                return steps
        raise RuntimeError("hessian-eigenthings did not converge in 1000 steps")

    def top(self, count: int, tol: float, steps: int = 100) -> Values:
        """Return the largest eigenvalues, from the start."""
        from hessian_eigenthings import lanczos as run

        self.start()
        found = run(
            self.operator, k=count, max_iter=steps, tol=tol, reorthogonalize=True, which="LA",
            seed=0,
        )  # fmt: skip
        self.num_products = found.iterations
        return found.eigenvalues.double().numpy()

    def lanczos(self, steps: int) -> Values:
        """Return the leading Ritz values of a run of so many steps with the operator."""
        from hessian_eigenthings import lanczos as run

        found = run(
            self.operator, k=steps // 4, max_iter=steps, reorthogonalize=True, which="LA", seed=0
        )
        self.num_products = found.iterations
        return found.eigenvalues.double().numpy()


class Curvlinops:
    """curvlinops: forward over reverse, and SciPy's ARPACK as its documentation shows."""

    name = "curvlinops + SciPy"
    module = "curvlinops"
    top_settings = "scipy.sparse.linalg.eigsh(k=10, which='LA', tol=1e-3)"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def start(self) -> Callable[[Tensor], Tensor]:
        """Build the operator, and return its product with a vector [n]."""
        from curvlinops import HessianLinearOperator

        model = copy.deepcopy(self.problem.model)
        self.operator = HessianLinearOperator(
            model, self.problem.criterion, [p for p in model.parameters() if p.requires_grad],
            list(self.problem.batches), check_deterministic=False,
        )  # fmt: skip
        return lambda vector: self.operator @ vector

    def stop(self) -> None:
        """End what `start` began."""

    def top(self, count: int, tol: float) -> Values:
        """Return the largest eigenvalues, from the start."""
        from scipy.sparse.linalg import eigsh

        self.start()
        counted = _Counted(self.operator.to_scipy())
        values = eigsh(counted.operator, k=count, which="LA", tol=tol, return_eigenvectors=True)[0]
        self.num_products = counted.count
        return np.sort(values)[::-1].astype(np.float64)

    def lanczos(self, steps: int) -> Values:
        """Return none: ARPACK stops after the first ``steps`` vectors, without convergence."""
        from scipy.sparse.linalg import ArpackNoConvergence, eigsh

        counted = _Counted(self.operator.to_scipy(), stop_after=steps)
        with suppress(ArpackNoConvergence, _Enough):
            eigsh(counted.operator, k=steps // 4, ncv=steps, which="LA", tol=1e-12, maxiter=1)
        self.num_products = counted.count
        return np.empty(0)


class PyHessian:
    """PyHessian's release on PyPI: retained graph for one batch, rebuilt for several.

    Its density estimate calls ``torch.eig``, which torch no longer has; the same result by
    ``torch.linalg.eigh`` is put into its place, so that its Lanczos run can end.
    """

    name = "PyHessian"
    module = "pyhessian"
    top_settings = "eigenvalues(top_n=10, maxIter=100, tol=1e-3): power iterations"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def start(self) -> Callable[[Tensor], Tensor]:
        """Build its Hessian, and return the product with a vector [n]."""
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        model = copy.deepcopy(self.problem.model)
        batches = list(self.problem.batches)
        data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        self.hessian = hessian(model, self.problem.criterion, cuda=False, **data)
        shapes = [p.shape for p in self.hessian.params]

        def product(vector: Tensor) -> Tensor:
            parts = vector.split([math.prod(shape) for shape in shapes])
            tangents = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            if len(batches) == 1:
                found = hessian_vector_product(self.hessian.gradsH, self.hessian.params, tangents)
            else:
                found = self.hessian.dataloader_hv_product(tangents)[1]
            return torch.cat([part.reshape(-1) for part in found])

        return product

    def stop(self) -> None:
        """End what `start` began: its gradients hold their graph."""
        for parameter in self.hessian.params:
            parameter.grad = None
        del self.hessian

    def top(self, count: int, tol: float) -> Values:
        """Return the largest eigenvalues in magnitude, from the start."""
        torch.manual_seed(0)
        self.start()
        values, _ = self.hessian.eigenvalues(maxIter=100, tol=tol, top_n=count)
        self.stop()
        self.num_products = None
        return np.sort(np.array(values))[::-1]

    def lanczos(self, steps: int) -> Values:
        """Return the leading Ritz values of a run of so many steps."""
        torch.manual_seed(0)
        with _eig_by_eigh():
            values, _ = self.hessian.density(iter=steps, n_v=1)
        self.num_products = steps
        return np.sort(np.array(values[0], dtype=np.float64))[::-1][: steps // 4]


PEERS = (PyHessian, HessianEigenthings, Curvlinops)


def installed() -> list[type]:
    """Return the peers that are installed; the others are named on the way."""
    found = []
    for peer in PEERS:
        if find_spec(peer.module) is None:
            print(f"skipped: {peer.name} is not installed (make bench installs it)", flush=True)
        else:
            found.append(peer)
    return found


class _Enough(Exception):  # noqa: N818 - not an error
    """As many products as were wanted."""


class _Counted:
    """A SciPy operator that counts its products."""

    def __init__(self, operator: Any, stop_after: int | None = None) -> None:
        from scipy.sparse.linalg import LinearOperator

        self.count = 0

        def matvec(vector: Any) -> Any:
            if self.count == stop_after:
                raise _Enough
            self.count += 1
            return operator @ vector.reshape(-1)

        self.operator = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)


@contextmanager
def _eig_by_eigh() -> Iterator[None]:
    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    before = torch.eig
    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = before

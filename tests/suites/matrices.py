"""Matrices whose eigenvalues others have published, as closed forms or by LAPACK."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LaplacianNd
from scipy.sparse.linalg._special_sparse_arrays import MikotaPair, Sakurai


@dataclass(frozen=True)
class Case:
    """A symmetric matrix, its eigenvalues in descending order, and how many to ask for."""

    name: str
    matrix: np.ndarray
    exact: np.ndarray
    wanted: int
    tol: float = 1e-8


def _descending(values) -> np.ndarray:
    return np.sort(np.asarray(values, dtype=np.float64))[::-1]


def laplacians() -> Iterator[Case]:
    """SciPy's grids with closed forms; square ones have exact multiplicities, up to eight."""
    for shape in ((20, 20), (16, 16), (13, 17), (7, 7, 7)):
        for boundary in ("dirichlet", "neumann", "periodic"):
            grid = LaplacianNd(shape, boundary_conditions=boundary, dtype=np.float64)
            name = f"{shape} {boundary}"
            matrix, exact = grid.toarray(), grid.eigenvalues()
            yield Case(f"minus {name}", -matrix, _descending(-exact), 50)
            yield Case(name, matrix, _descending(exact), 50)


def sakurai() -> Iterator[Case]:
    """Condition about n^4."""
    for n in (20, 60, 150):
        given = Sakurai(n)
        exact = _descending(given.eigenvalues())
        yield Case(f"n = {n}", given.toarray().astype(np.float64), exact, min(20, n))


def mikota() -> Iterator[Case]:
    """A chain of springs and masses: the squares 1, 4, 9, ..., n^2."""
    for n in (10, 50, 120):
        pair = MikotaPair(n)
        root = 1 / np.sqrt(pair.m.toarray().diagonal())
        stiffness = pair.k.toarray() * root[:, None] * root
        yield Case(f"n = {n}", stiffness, _descending(np.arange(1, n + 1.0) ** 2), min(20, n))


def _tridiagonal(diagonal, beside) -> np.ndarray:
    return np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


def glued_wilkinson() -> Iterator[Case]:
    """W21+ several times over, glued by a small number (LAPACK's stetester, TOMS 880)."""
    block = np.abs(np.arange(-10, 11.0))
    for copies in (2, 5, 10):
        for glue in (1e-3, 1e-8, 1e-14):
            beside = np.ones(21 * copies - 1)
            beside[20::21] = glue
            matrix = _tridiagonal(np.tile(block, copies), beside)
            exact = _descending(scipy.linalg.eigvalsh(matrix))
            yield Case(f"{copies} times, glue {glue:g}", matrix, exact, 3 * copies)


def classical_tridiagonals() -> Iterator[Case]:
    """Tridiagonals of stetester with closed forms: (1, 2, 1), Clement, Hermite, Legendre."""
    n = 120
    j = np.arange(1, n + 1.0)
    toeplitz = 2 - 2 * np.cos(np.pi * j / (n + 1))
    yield Case(
        "(1, 2, 1)", _tridiagonal(np.full(n, 2.0), np.ones(n - 1)), _descending(toeplitz), 20
    )
    clement = _tridiagonal(np.zeros(n), np.sqrt(j[:-1] * (n - j[:-1])))
    yield Case("Clement", clement, _descending(np.arange(1 - n, n, 2.0)), 20)
    hermite = _tridiagonal(np.zeros(n), np.sqrt(j[:-1] / 2))
    yield Case("Hermite", hermite, _descending(np.polynomial.hermite.hermgauss(n)[0]), 20)
    legendre = _tridiagonal(np.zeros(n), j[:-1] / np.sqrt(4 * j[:-1] ** 2 - 1))
    yield Case("Legendre", legendre, _descending(np.polynomial.legendre.leggauss(n)[0]), 20)


def graded_and_clustered() -> Iterator[Case]:
    """Spectra of stetester's types, from xLATMS: clusters at either end, graded, even, random."""
    n, eps = 150, np.finfo(np.float64).eps
    k = np.arange(n)
    rng = np.random.default_rng(0)
    types = {
        "one large, the rest at ulp": np.r_[1.0, np.full(n - 1, eps)],
        "one at ulp, the rest 1": np.r_[np.ones(n - 1), eps],
        "geometric down to ulp": eps ** (k / (n - 1)),
        "geometric down to 1e-4": 1e-4 ** (k / (n - 1)),
        "even": 1 - k / (n - 1) * (1 - eps),
        "random logarithms": np.exp(rng.uniform(np.log(1e-8), 0, n)),
        "clusters a millionth wide": np.repeat(1 / np.arange(1, 31.0), 5) + 1e-6 * (k % 5),
        "pairs of either sign": np.repeat(np.linspace(-1, 1, n // 2), 2),
    }
    for name, spectrum in types.items():
        rotation = np.linalg.qr(rng.normal(size=(n, n)))[0]
        dense = (rotation * spectrum) @ rotation.T
        matrix = scipy.linalg.hessenberg((dense + dense.T) / 2)
        matrix = np.triu(np.tril(matrix, 1), -1)
        matrix = (matrix + matrix.T) / 2
        yield Case(name, matrix, _descending(scipy.linalg.eigvalsh(matrix)), 20)


def published() -> Iterator[Case]:
    """What the manuals of SciPy (eigsh, lobpcg) and PRIMME print."""
    yield Case("SciPy eigsh: eye(13)", np.eye(13), np.ones(6), 6)
    yield Case("SciPy lobpcg: 1 to 100", np.diag(np.arange(1, 101.0)), np.r_[100.0, 99, 98], 3)
    yield Case("PRIMME eigsh: 0 to 99", np.diag(np.arange(100.0)), np.r_[99.0, 98, 97], 3)
    diagonal = -np.diag(np.arange(100.0))
    yield Case("PRIMME eigsh: the least", diagonal, np.r_[0.0, -1, -2, -3], 4)


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "SciPy LaplacianNd, K = 50": laplacians,
    "SciPy Sakurai": sakurai,
    "SciPy MikotaPair": mikota,
    "Glued Wilkinson matrices": glued_wilkinson,
    "Tridiagonals with closed forms": classical_tridiagonals,
    "LAPACK stetester: graded, clustered": graded_and_clustered,
    "SciPy's and PRIMME's manuals": published,
}

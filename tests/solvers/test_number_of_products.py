"""How many products a run takes: hardly more than Lanczos without restart, and a search."""

import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.lanczos import lanczos

N, K, TOL = 3000, 50, 1e-3


class Diagonal(MatrixOperator):
    """A diagonal matrix; Lanczos from a random vector sees the eigenvalues alone."""

    def __init__(self, diagonal):
        super().__init__(diagonal.new_zeros(1, 1).expand(len(diagonal), len(diagonal)))
        self.diagonal = diagonal

    def matvec(self, vector):
        return self.diagonal * vector

    def matmat(self, vectors):
        return self.diagonal * vectors


def spectrum(name):
    """Return eigenvalues as networks have them: a power law above a bulk, part of it negative."""
    ranks = np.arange(1, N + 1.0)
    values = {
        "steep": ranks**-1.5,
        "power law": 1 / ranks,
        "flat": ranks**-0.6,
        "outliers": np.where(ranks <= 9, 10 / ranks, 0.3 * ranks**-0.7),
    }[name]
    below = np.random.default_rng(0).random(N // 3)
    values[-len(below) :] = -0.2 * values[K] * below
    return values


def steps_without_restart(values):
    """Return after how many steps of textbook Lanczos, reorthogonalised, all K have converged."""
    vector = np.random.default_rng(0).normal(size=N)
    basis = [vector / np.linalg.norm(vector)]
    diagonal, beside = [], []
    while True:
        product = values * basis[-1]
        diagonal.append(product @ basis[-1])
        for _ in range(2):
            product -= np.array(basis).T @ (np.array(basis) @ product)
        beside.append(np.linalg.norm(product))
        basis.append(product / beside[-1])
        m = len(diagonal)
        if m > K:
            found, vectors = eigh_tridiagonal(
                diagonal, beside[:-1], select="i", select_range=(m - K, m - 1)
            )
            if (beside[-1] * np.abs(vectors[-1]) <= TOL * np.abs(found)).all():
                return m


@pytest.mark.parametrize("name", ["steep", "power law", "flat", "outliers"])
def test_products_are_few(name):
    values = spectrum(name)
    floor = steps_without_restart(values)
    operator = Diagonal(torch.from_numpy(values))
    alone = lanczos(operator, K, tol=TOL, num_checks=0)
    searched = lanczos(operator, K, tol=TOL)
    assert alone.converged.all()
    assert searched.converged.all()
    assert alone.num_products <= 1.12 * floor
    assert searched.num_products <= 1.2 * floor

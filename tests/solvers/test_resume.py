"""A run that is interrupted, wherever, ends with the digits of one that was not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.allowances import stop_at_product
from test_checkpoint import alike
from test_lanczos import Watched, matrix_of

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.lanczos import lanczos
from lightning_hessian.solvers.storage import BasisStorage

N = 40
PROBLEMS = {
    "pairs": (np.repeat(1 / np.arange(1, N // 2 + 1.0), 2), {}),
    "pairs, smallest basis": (np.repeat(1 / np.arange(1, N // 2 + 1.0), 2), {"max_basis": 9}),
    "quadruples": (np.repeat(np.arange(1, 7.0), 4), {"max_basis": 12}),
    "low rank": (np.r_[[3.0, 3.0, 3.0, 2.0, 2.0], np.zeros(N - 5)], {}),
    "half the precision": (
        np.repeat(1 / np.arange(1, N // 2 + 1.0), 2),
        {"storage": BasisStorage(dtype="bfloat16"), "tol": 2e-2},
    ),
}


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    spectrum, options = PROBLEMS[request.param]
    dtype = torch.float32 if "storage" in options else torch.float64
    matrix = matrix_of(spectrum, dtype)
    return matrix, options, lanczos(MatrixOperator(matrix), 6, **options)


@pytest.mark.parametrize("how", ["a bound", "a question", "an exception"])
def test_interrupted_at_any_product_it_ends_with_the_same_digits(problem, how, tmp_path):
    """Searches for missed copies, checks and restarts included."""
    matrix, options, whole = problem
    assert whole.num_products > 16
    for cut in range(6, whole.num_products):
        file, operator = tmp_path / f"{cut}", Watched(matrix)
        if how == "a bound":
            first = lanczos(operator, 6, checkpoint=file, max_products=cut, **options)
        elif how == "a question":
            stop = stop_at_product(operator, cut)
            first = lanczos(operator, 6, checkpoint=file, allowance=stop, **options)
        else:
            first = None
            with pytest.raises(KeyboardInterrupt):
                lanczos(Failing(operator, cut), 6, checkpoint=file, **options)
        assert file.exists(), cut
        assert first is None or (first.num_products, len(first.values)) == (cut, 6)
        rest = Watched(matrix)
        assert alike(lanczos(rest, 6, checkpoint=file, **options), whole), cut
        assert rest.num_products == whole.num_products - cut + 1  # one tells matrices apart
        assert not file.exists()


class Failing(MatrixOperator):
    """Raises in the product after so many."""

    def __init__(self, operator: Watched, after: int) -> None:
        super().__init__(operator.matrix)
        self.left = after

    def matvec(self, vector):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().matvec(vector)


def test_interrupted_again_and_again_it_ends_with_the_same_digits(problem, tmp_path):
    matrix, options, whole = problem
    file, sessions = tmp_path / "run", 0
    rng = np.random.default_rng(1)
    while True:
        operator, patience = Watched(matrix), int(rng.integers(2, 6))
        found = lanczos(
            operator, 6, checkpoint=file, **options,
            allowance=stop_at_product(operator, patience),
        )  # fmt: skip
        sessions += 1
        if found.stopped != "interrupted":
            break
    assert sessions > 4
    assert alike(found, whole)
    assert list(tmp_path.iterdir()) == []

"""Runs that are interrupted and taken up again: the digits of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.allowances import stop_at_product
from test_lanczos import SPECTRA, N, Watched, matrix_of

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers import checkpoint as checkpoints
from lightning_hessian.solvers.lanczos import RitzPairs, lanczos
from lightning_hessian.solvers.storage import BasisStorage

SPECTRUM = np.linspace(-0.5, 1, N) ** 3
OPTIONS = {"tol": 1e-7, "max_basis": 20, "max_products": 2000}


def alike(first: RitzPairs, second: RitzPairs) -> bool:
    return (
        np.array_equal(first.values, second.values)
        and np.array_equal(first.residuals, second.residuals)
        and torch.equal(first.vectors, second.vectors)
        and (first.lowest, first.lowest_residual) == (second.lowest, second.lowest_residual)
        and (first.num_products, first.stopped) == (second.num_products, second.stopped)
    )


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def matrix(request):
    return matrix_of(SPECTRUM, request.param)


@pytest.fixture(scope="module")
def whole(matrix):
    options = OPTIONS | {"tol": 1e-7 if matrix.dtype == torch.float64 else 1e-4}
    found = lanczos(MatrixOperator(matrix), 10, **options)
    assert found.stopped == "converged"
    assert found.num_products > 60  # several restarts
    return found


def options_of(matrix) -> dict:
    return OPTIONS | {"tol": 1e-7 if matrix.dtype == torch.float64 else 1e-4}


def test_a_run_stopped_every_few_products_ends_with_the_same_digits(matrix, whole, tmp_path):
    """Stopped before, at and after every kind of event: checks, restarts, the last search."""
    file, sessions = tmp_path / "run", 0
    rng = np.random.default_rng(0)
    while True:
        operator, patience = Watched(matrix), int(rng.integers(2, 8))
        found = lanczos(
            operator, 10, checkpoint=file, **options_of(matrix),
            allowance=stop_at_product(operator, patience),
        )  # fmt: skip
        sessions += 1
        if found.stopped != "interrupted":
            break
        assert file.exists()
        assert found.num_products <= whole.num_products
    assert sessions > 10
    # The search for missed copies may be cut short by an interruption: it has found nothing more.
    assert np.array_equal(found.values, whole.values)
    assert np.array_equal(found.residuals, whole.residuals)
    assert torch.equal(found.vectors, whole.vectors)
    assert not file.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [1, 11, 12, 31, 50])
def test_a_bound_that_is_raised_goes_on(matrix, whole, tmp_path, after):
    file, options = tmp_path / "run", options_of(matrix)
    bounded = options | {"max_products": max(after, 10)}
    first = lanczos(MatrixOperator(matrix), 10, checkpoint=file, **bounded)
    assert first.stopped == "bound"
    # Nothing is left to do within the same bound, but to say so again.
    operator = Watched(matrix)
    again = lanczos(operator, 10, checkpoint=file, **bounded)
    assert operator.num_products == 1  # the product that tells matrices apart
    assert alike(first, again)
    assert alike(lanczos(MatrixOperator(matrix), 10, checkpoint=file, **options), whole)


@pytest.mark.parametrize("after", [2, 30, 51])
def test_an_exception_in_a_product_loses_nothing(matrix, whole, tmp_path, after):
    class Failing(Watched):
        def matvec(self, vector):
            if self.num_products == after:
                raise KeyboardInterrupt
            return super().matvec(vector)

    file, options = tmp_path / "run", options_of(matrix)
    with pytest.raises(KeyboardInterrupt):
        lanczos(Failing(matrix), 10, checkpoint=file, **options)
    operator = Watched(matrix)
    assert alike(lanczos(operator, 10, checkpoint=file, **options), whole)
    assert operator.num_products == whole.num_products - after + 1


def test_a_process_that_is_killed_loses_the_last_minutes_only(matrix, whole, tmp_path, monkeypatch):
    """What is on disk while a run goes on is a run that can be taken up."""
    file, options, kept = tmp_path / "run", options_of(matrix), []
    save = checkpoints.save

    def copied(run, path):
        save(run, path)
        kept.append(path.read_bytes())

    monkeypatch.setattr(checkpoints, "save", copied)
    lanczos(MatrixOperator(matrix), 10, checkpoint=file, checkpoint_seconds=0, **options)
    assert len(kept) == whole.num_products
    monkeypatch.setattr(checkpoints, "save", save)
    for at in (0, 40, len(kept) - 2):
        file.write_bytes(kept[at])
        assert alike(lanczos(MatrixOperator(matrix), 10, checkpoint=file, **options), whole)


@pytest.mark.parametrize("storage", ["disk", "bfloat16"])
def test_bases_elsewhere_and_in_half_the_precision_are_kept_too(tmp_path, storage):
    given = BasisStorage(tier="disk") if storage == "disk" else BasisStorage(dtype="bfloat16")
    matrix = matrix_of(SPECTRA["power law"], torch.float32)
    options = {"tol": 1e-2, "storage": given}
    whole = lanczos(MatrixOperator(matrix), 10, **options)
    file, operator = tmp_path / "run", Watched(matrix)
    stopped = lanczos(
        operator, 10, checkpoint=file, allowance=stop_at_product(operator, 14), **options
    )
    assert stopped.stopped == "interrupted"
    assert alike(lanczos(MatrixOperator(matrix), 10, checkpoint=file, **options), whole)


# What is refused --------------------------------------------------------------------------------


@pytest.fixture
def interrupted(tmp_path):
    file = tmp_path / "run"
    lanczos(
        MatrixOperator(matrix_of(SPECTRUM)), 10, checkpoint=file, **(OPTIONS | {"max_products": 40})
    )
    return file


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tol": 1e-3}, "tol 1e-07 there, 0.001 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"num_eigenvalues": 9}, "num_eigenvalues 10 there, 9 here"),
        ({"storage": BasisStorage(dtype="bfloat16")}, "basis_dtype None there, 'bfloat16' here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(interrupted, changed, message):
    options = OPTIONS | {"num_eigenvalues": 10} | changed
    before = interrupted.read_bytes()
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(matrix_of(SPECTRUM)), checkpoint=interrupted, **options)
    assert interrupted.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (matrix_of(SPECTRUM, torch.float32), "dtype 'torch.float64' there"),
        (matrix_of(SPECTRUM[1:]), f"n {N} there, {N - 1} here"),
        (matrix_of(SPECTRUM, seed=1), "another matrix of the same order"),
        (matrix_of(1.05 * SPECTRUM), "another matrix of the same order"),
    ],
)
def test_a_checkpoint_of_another_operator_is_refused(interrupted, other, message):
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(other), 10, checkpoint=interrupted, **OPTIONS)


@pytest.mark.parametrize("damage", ["cut", "longer", "header", "other"])
def test_a_damaged_file_is_refused(interrupted, damage):
    whole = interrupted.read_bytes()
    interrupted.write_bytes(
        {
            "cut": whole[:-100],
            "longer": whole + b"0",
            "header": whole[:200] + b"0" * 400 + whole[600:],
            "other": b"something else",
        }[damage]
    )
    message = "no checkpoint of a Lanczos run" if damage == "other" else "damaged"
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(matrix_of(SPECTRUM)), 10, checkpoint=interrupted, **OPTIONS)


def test_a_write_that_fails_leaves_the_file_of_before(interrupted, monkeypatch):
    before = interrupted.read_bytes()

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.warns(UserWarning, match=r"could not be written .*No space"):
        found = lanczos(
            MatrixOperator(matrix_of(SPECTRUM)), 10, checkpoint=interrupted,
            **(OPTIONS | {"max_products": 60}),
        )  # fmt: skip
    assert found.stopped == "bound"  # the result is there all the same
    assert interrupted.read_bytes() == before
    assert [path.name for path in interrupted.parent.iterdir()] == ["run"]


class Named(MatrixOperator):
    """An operator whose products were made by some engine, with its rounding."""

    def __init__(self, matrix, engine):
        super().__init__(matrix)
        self.engine = engine


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        ("linearize", "autograd", "hvp='linearize'"),
        ("autograd+recompute", "finite_difference", "hvp='autograd'"),
        ("linearize+autograd", "linearize", "delete it"),
        ("autograd", "autograd+recompute", None),
        ("recompute", "autograd", None),
    ],
)
def test_a_run_goes_on_with_engines_of_the_same_digits_only(tmp_path, before, now, remedy):
    matrix, file = matrix_of(SPECTRUM, torch.float64), tmp_path / "run"
    lanczos(Named(matrix, before), 10, checkpoint=file, **OPTIONS | {"max_products": 20})
    if remedy is None:
        assert lanczos(Named(matrix, now), 10, checkpoint=file, **OPTIONS).stopped == "converged"
        return
    with pytest.raises(ValueError, match=rf"engine.*{now}.*{remedy}"):
        lanczos(Named(matrix, now), 10, checkpoint=file, **OPTIONS)


def test_a_file_that_names_no_engine_goes_on(tmp_path, monkeypatch):
    matrix, file = matrix_of(SPECTRUM, torch.float64), tmp_path / "run"
    identity = checkpoints.identity
    with monkeypatch.context() as older:
        older.setattr(
            checkpoints,
            "identity",
            lambda run: {k: v for k, v in identity(run).items() if k != "engine"},
        )
        lanczos(Named(matrix, "autograd"), 10, checkpoint=file, **OPTIONS | {"max_products": 20})
    found = lanczos(Named(matrix, "linearize"), 10, checkpoint=file, **OPTIONS)
    assert found.stopped == "converged"


@pytest.mark.parametrize("place", ["missing/run", "a file/run", ""])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, place):
    (tmp_path / "a file").write_text("")
    operator = Watched(matrix_of(SPECTRUM))
    with pytest.raises(ValueError, match=r"^checkpoint="):
        lanczos(operator, 10, checkpoint=tmp_path / place, **OPTIONS)
    assert operator.num_products == 0


def test_a_write_that_fails_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    class Breaks(Watched):
        def matvec(self, vector):
            if self.num_products == 30:
                raise RuntimeError("the real cause")
            return super().matvec(vector)

    monkeypatch.setattr(checkpoints.os, "fsync", lambda _: exec("raise OSError(28, 'full')"))
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(RuntimeError, match="the real cause"),
    ):
        lanczos(Breaks(matrix_of(SPECTRUM)), 10, checkpoint=tmp_path / "run", **OPTIONS)


SIGNALLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from test_checkpoint import OPTIONS, SPECTRUM
from test_lanczos import Watched, matrix_of
from lightning_hessian.solvers.lanczos import lanczos
class Signalled(Watched):
    def matvec(self, vector):
        if self.num_products == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().matvec(vector)
{handler}
lanczos(Signalled(matrix_of(SPECTRUM)), 10, checkpoint={file!r}, **OPTIONS)
"""
HANDLERS = {
    "none": "",
    "one that ends": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))",
}


@pytest.mark.parametrize(("name", "code"), [("none", -15), ("one that ends", 7)])
def test_sigterm_saves_the_state_and_ends_as_it_would_have(tmp_path, name, code):
    here, file = Path(__file__).parent, tmp_path / "run"
    paths = [str(here), str(here.parent), str(here.parents[1])]
    script = SIGNALLED.format(paths=paths, handler=HANDLERS[name], file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert file.exists()
    resumed = lanczos(MatrixOperator(matrix_of(SPECTRUM)), 10, checkpoint=file, **OPTIONS)
    whole = lanczos(MatrixOperator(matrix_of(SPECTRUM)), 10, **OPTIONS)
    np.testing.assert_allclose(resumed.values, whole.values, rtol=1e-12)
    assert resumed.num_products == whole.num_products


def test_a_sigterm_handler_that_goes_on_is_called_and_put_back(tmp_path):
    heard = []

    class Signalled(Watched):
        def matvec(self, vector):
            if self.num_products == 30:
                os.kill(os.getpid(), signal.SIGTERM)
                assert (tmp_path / "run").exists()
            return super().matvec(vector)

    mine = lambda *_: heard.append(1)  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        found = lanczos(Signalled(matrix_of(SPECTRUM)), 10, checkpoint=tmp_path / "run", **OPTIONS)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found.stopped == "converged"
    assert heard == [1]


def test_a_file_that_names_no_matrix_is_of_a_hessian(tmp_path, monkeypatch):
    matrix, file = matrix_of(SPECTRUM, torch.float64), tmp_path / "run"
    identity = checkpoints.identity
    with monkeypatch.context() as older:
        older.setattr(
            checkpoints,
            "identity",
            lambda run: {k: v for k, v in identity(run).items() if k != "matrix"},
        )
        lanczos(MatrixOperator(matrix), 10, checkpoint=file, **OPTIONS | {"max_products": 20})
    other = MatrixOperator(matrix)
    other.matrix_kind = "gauss_newton"
    with pytest.raises(ValueError, match="matrix 'hessian' there, 'gauss_newton' here"):
        lanczos(other, 10, checkpoint=file, **OPTIONS)
    found = lanczos(MatrixOperator(matrix), 10, checkpoint=file, **OPTIONS)
    assert found.stopped == "converged"

"""The argument ``matrix`` of what measures, from the operator of a session to the callback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.gauss_newton_oracle import (
    apart,
    dense_gauss_newton,
    softmax_curvature,
)
from support.operators import as_matrix
from support.references import Problem, dense_hessian, in_double, mlp, trainable
from torch import Tensor
from torch.nn import functional as F

from lightning_hessian import (
    ArgumentError,
    HessianSpectrumCallback,
    block_structure,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.measure.session import Session
from lightning_hessian.results import load_spectrum, save_spectrum


@pytest.fixture
def given() -> Problem:
    """An MLP in float64, with ragged batches."""
    torch.manual_seed(0)
    found = mlp()
    parts = (in_double(part) for part in (found.module, found.batches, found.whole))
    module, batches, whole = parts
    return Problem(module, found.loss_fn, batches, whole)


def dense(given: Problem) -> Tensor:
    count = len(given.whole[0])
    weights = torch.ones(count).double() / count
    return dense_gauss_newton(
        given.module, given.whole[0], lambda z: softmax_curvature(z.view(count, 3), weights)
    )


def written_out(module: Any, batch: Any) -> Any:
    """The same cross-entropy, by hand."""

    def loss(logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        return (logits.logsumexp(-1) - logits[rows, batch[1]]).mean()

    return module(batch[0]), loss


# Functions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["found", "given"])
def test_the_spectrum_is_that_of_the_dense_matrix(given, how, tmp_path):
    values, vectors = torch.linalg.eigh(dense(given))
    options = LossOptions(outputs_and_loss=written_out) if how == "given" else None
    loss_fn = given.loss_fn if how == "found" else None
    found = hessian_spectrum(
        given.module, loss_fn, given.batches, num_eigenvalues=6, tol=1e-9, trace_probes=0,
        matrix="gauss_newton", loss_options=options, return_eigenvectors=True,
    )  # fmt: skip
    np.testing.assert_allclose(found.eigenvalues, values.flip(0)[:6], rtol=1e-9)
    assert abs(float(found.eigenvectors[0] @ vectors[:, -1])) == pytest.approx(1, abs=1e-9)
    assert (found.matrix_kind, found.engine) == ("gauss_newton", "autograd")
    assert "Gauss-Newton matrix" in repr(found)
    save_spectrum(found, tmp_path / "found.npz")
    assert load_spectrum(tmp_path / "found.npz").matrix_kind == "gauss_newton"


def test_the_hessian_is_what_is_measured_by_default(given):
    arguments = (given.module, given.loss_fn, given.batches)
    found = hessian_spectrum(*arguments, num_eigenvalues=1, trace_probes=0)
    assert found.matrix_kind == "hessian"
    expected = torch.linalg.eigvalsh(dense_hessian(given.module, given.loss_fn, given.whole))
    assert found.eigenvalues[0] == pytest.approx(float(expected[-1]), rel=1e-3)
    assert block_structure(*arguments).matrix_kind == "hessian"


def test_blocks_and_layers_are_those_of_the_dense_matrix(given):
    expected = dense(given)
    arguments = (given.module, given.loss_fn, given.batches)
    blocks = block_structure(*arguments, matrix="gauss_newton", return_matrix=True)
    assert apart(torch.from_numpy(blocks.matrix), expected) < 1e-10
    assert blocks.matrix_kind == "gauss_newton"
    layers = layer_spectra(
        *arguments, num_eigenvalues=3, tol=1e-8, trace_probes=0, matrix="gauss_newton"
    )
    first = sum(p.numel() for name, p in trainable(given.module).items() if name[0] == "0")
    for name, block in (("0", expected[:first, :first]), ("2", expected[first:, first:])):
        values = torch.linalg.eigvalsh(block).flip(0)[:3]
        np.testing.assert_allclose(layers[name].eigenvalues, values, rtol=1e-7)
        assert layers[name].matrix_kind == "gauss_newton"


# Sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "autograd", "finite_difference"])
def test_the_residual_is_the_hessian_minus_the_gauss_newton_matrix(given, engine):
    hessian = dense_hessian(given.module, given.loss_fn, given.whole)
    expected = hessian - dense(given)
    tolerance = 1e-5 if engine == "finite_difference" else 1e-10
    with Session(given.module, given.loss_fn, given.batches, hvp=engine) as session:
        residual = session.operator(matrix="residual")
        assert residual.matrix_kind == "residual"
        assert apart(as_matrix(residual), expected) < tolerance
        last = session.operator(["2.bias"], matrix="residual")
        # The network is linear in its last layer: nothing of the Hessian is missing there.
        assert as_matrix(last).norm() < tolerance * hessian.norm()
        assert session.operator().matrix_kind == "hessian"
        assert session.operator() is session.operator(matrix="hessian")
        with pytest.raises(ValueError, match="matrix='fisher'"):
            session.operator(matrix="fisher")


def test_the_residual_vanishes_where_the_residuals_do(given):
    inputs = given.whole[0]
    targets = given.module(inputs).detach()

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return F.mse_loss(module(batch[0]), batch[1])

    sizes = {}
    for shift in (0.0, 0.1):
        batch = (inputs, targets + shift)
        with Session(given.module, loss_fn, [batch], hvp="autograd") as session:
            sizes[shift] = as_matrix(session.operator(matrix="residual")).norm()
            whole = as_matrix(session.operator()).norm()
    assert sizes[0.0] < 1e-14 * whole
    assert sizes[0.1] > 1e-3 * whole


def test_products_of_both_operators_count_against_the_allowance(given):
    with Session(given.module, given.loss_fn, given.batches, matrix="gauss_newton") as session:
        allowance = Budget(products=10).open(session)
        vector = torch.ones(session.space.size, dtype=torch.float64)
        session.operator().matvec(vector)
        session.operator(matrix="residual").matvec(vector)
        assert allowance.spent == 3


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["linearize", "compile", "finite_difference"])
def test_an_engine_that_cannot_is_refused_before_any_work(given, engine):
    words = f"^hvp='{engine}'.*'auto', 'autograd', 'recompute'"
    with pytest.raises(ArgumentError, match=words):
        hessian_spectrum(
            given.module, given.loss_fn, given.batches, matrix="gauss_newton", hvp=engine
        )
    with pytest.raises(ArgumentError, match=words):
        HessianSpectrumCallback(matrix="gauss_newton", hvp=engine)


def test_one_loss_is_given_not_two(given):
    options = LossOptions(outputs_and_loss=written_out)
    with pytest.raises(ArgumentError, match="loss_fn=None"):
        hessian_spectrum(given.module, given.loss_fn, given.batches, loss_options=options)
    with pytest.raises(ArgumentError, match="loss_fn=None"):
        HessianSpectrumCallback(loss_fn=given.loss_fn, loss_options=options)
    with pytest.raises(ArgumentError, match=r"outputs_and_loss=.*\(module, batch\)"):
        LossOptions(outputs_and_loss=lambda module: None)


def test_a_lanczos_run_of_one_matrix_does_not_go_on_with_another(given, tmp_path):
    arguments: dict[str, Any] = {
        "num_eigenvalues": 4, "trace_probes": 0, "hvp": "autograd",
        "checkpoint": tmp_path / "run", "budget": Budget(products=5),
    }  # fmt: skip
    measured = (given.module, given.loss_fn, given.batches)
    hessian_spectrum(*measured, matrix="gauss_newton", **arguments)
    with pytest.raises(ValueError, match="matrix 'gauss_newton' there, 'hessian' here"):
        hessian_spectrum(*measured, **arguments)

"""Products with the Gauss-Newton matrix, against the dense J^T H_L J in float64."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.gauss_newton_oracle import (
    apart,
    dense_gauss_newton,
    dense_jacobian,
    softmax_curvature,
)
from support.operators import as_matrix
from support.references import (
    PROBLEMS,
    Problem,
    cross_entropy,
    flat_loss,
    fused_attention,
    in_double,
    mlp,
    problem,
    tied_embedding,
    trainable,
)
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn import functional as F

from lightning_hessian.operators.gauss_newton import ENGINES, GaussNewtonOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@contextmanager
def gauss_newton(module, loss_fn, batches, engine="auto", **options: Any):
    built = {k: options.pop(k) for k in ("memory_budget", "marked") if k in options}
    objective = Objective(module, loss_fn, batches, ParameterSpace.select(module), **options)
    with objective.isolated():
        yield GaussNewtonOperator(objective, engine, **built)


@functools.cache
def reference(name: str) -> tuple[Problem, Tensor]:
    """Returns a problem, all of cross-entropy, and its dense matrix over all samples."""
    given = problem(name)
    inputs, targets = given.whole
    count = targets.numel()
    size = 7 if name == "tied_embedding" else 3

    def curvature(outputs: Tensor) -> Tensor:
        return softmax_curvature(outputs.view(count, size), torch.ones(count).double() / count)

    return given, dense_gauss_newton(given.reference_module(), inputs, curvature)


def in_precision(given: Problem, dtype: torch.dtype):
    if dtype == torch.float64:
        return in_double(given.module), in_double(given.batches)
    return given.module, given.batches


# Networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", PROBLEMS)
def test_products_agree_with_the_dense_matrix(name, engine, dtype):
    given, expected = reference(name)
    module, batches = in_precision(given, dtype)
    with gauss_newton(module, given.loss_fn, batches, engine, mode=given.mode) as operator:
        vectors = torch.randn(6, operator.size, dtype=torch.float64)
        found = torch.stack([operator.matvec(vector.to(dtype)) for vector in vectors])
        assert found.dtype == dtype
        assert apart(found.double(), vectors.to(dtype).double() @ expected) < TOLERANCE[dtype]
        assert operator.num_products == 6
        assert operator.engine == ("autograd" if engine == "auto" else engine)
        together = operator.matmat(vectors.to(dtype))
        assert apart(together.double(), found.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["mlp", "convolution", "multihead_attention", "tied_embedding"])
def test_it_is_positive_semidefinite_where_the_hessian_is_not(name):
    given, _ = reference(name)
    module, batches = in_precision(given, torch.float64)
    with gauss_newton(module, given.loss_fn, batches) as operator:
        values = torch.linalg.eigvalsh(as_matrix(operator))
    assert float(values.min()) > -1e-13 * float(values.max())
    assert float(torch.linalg.eigvalsh(given.hessian()).min()) < -1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_views_are_blocks_of_the_dense_matrix(engine):
    given, expected = reference("convolution")
    module, batches = in_precision(given, torch.float64)
    names = [name for name in trainable(module) if name in ("0.weight", "4.bias")]
    owners = [name for name, p in trainable(module).items() for _ in range(p.numel())]
    chosen = torch.tensor([owner in names for owner in owners])
    with gauss_newton(module, given.loss_fn, batches, engine) as operator:
        view = operator.restricted(names)
        assert view.matrix_kind == "gauss_newton"
        assert apart(as_matrix(view), expected[chosen][:, chosen]) < 1e-10
        assert operator.num_products == int(chosen.sum())


def test_graphs_that_do_not_fit_are_recomputed_to_the_same_digits():
    given, _ = reference("mlp")
    module, batches = in_precision(given, torch.float64)
    with gauss_newton(module, given.loss_fn, batches, "autograd") as operator:
        whole, held = as_matrix(operator), operator._product_bytes()
    for budget, engine in ((0, "recompute"), (held, "autograd+recompute"), (1e9, "autograd")):
        with gauss_newton(module, given.loss_fn, batches, memory_budget=budget) as operator:
            assert operator.engine == engine
            assert torch.equal(as_matrix(operator), whole)


def test_masked_tokens_weigh_as_the_mean_over_all_tokens_says():
    given = tied_embedding()
    module = in_double(given.module)
    inputs, labels = given.whole
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.4, -100)
    batches = [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])]
    kept = (labels.flatten() != -100).double()
    assert len(kept) > kept.sum() > 0
    expected = dense_gauss_newton(
        module, inputs, lambda z: softmax_curvature(z.view(-1, 7), kept / kept.sum())
    )
    weight = {"batch_weight": lambda batch: float((batch[1] != -100).sum())}
    with gauss_newton(module, cross_entropy, batches, **weight) as operator:
        assert apart(as_matrix(operator), expected) < 1e-10


def test_dropout_in_training_mode_draws_the_same_for_every_product():
    module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = in_double(mlp().whole)
    matrices = []
    for engine in ENGINES:
        with gauss_newton(module, cross_entropy, [batch], engine, mode="train") as operator:
            matrices.append(as_matrix(operator))
    assert apart(matrices[0], matrices[1]) < 1e-12
    with gauss_newton(module, cross_entropy, [batch], mode="eval") as operator:
        assert apart(as_matrix(operator), matrices[0]) > 0.01


# Beside the Hessian -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_it_is_the_hessian_where_the_network_is_linear(loss):
    module = nn.Linear(5, 3).double()
    target = torch.rand(10, 3, dtype=torch.float64).softmax(-1)
    batch = (torch.randn(10, 5, dtype=torch.float64), target)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return loss(module(batch[0]), batch[1])

    with gauss_newton(module, loss_fn, [batch]) as operator:
        # Not by `dense_hessian`: forward mode through mse_loss is what torch 2.13 cannot do.
        scalar, point = flat_loss(module, loss_fn, batch)
        assert apart(as_matrix(operator), jacrev(grad(scalar))(point)) < 1e-10


def test_it_is_the_fisher_matrix_of_a_softmax():
    """The mean of outer products of gradients over labels that are drawn from the model itself."""
    given, expected = reference("mlp")
    inputs, _ = in_double(given.whole)
    outputs, jacobian = dense_jacobian(given.module, inputs)
    fisher = torch.zeros_like(expected)
    for row, rows in zip(outputs.view(-1, 3), jacobian.view(len(inputs), 3, -1), strict=True):
        p = row.softmax(-1)
        for label in range(3):
            slope = (p - F.one_hot(torch.tensor(label), 3)) @ rows
            fisher += p[label] * torch.outer(slope, slope) / len(inputs)
    assert apart(fisher, expected) < 1e-12


def test_curvlinops_agrees():
    """Where its forward over reverse is right: on an MLP and a convolution."""
    curvlinops = pytest.importorskip("curvlinops")
    for name in ("mlp", "convolution"):
        given, expected = reference(name)
        module, batch = in_double(given.module), in_double(given.whole)
        theirs = curvlinops.GGNLinearOperator(
            module, nn.CrossEntropyLoss(), list(module.parameters()), [batch]
        )
        size = theirs.shape[0]
        found = theirs @ torch.eye(size, dtype=torch.float64)
        assert apart(found, expected) < 1e-10


# What cannot be measured ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["linearize", "finite_difference", "compile", "nonsense"])
def test_other_engines_are_refused(engine):
    given = mlp()
    with (
        pytest.raises(ValueError, match=f"hvp='{engine}'.*'auto', 'autograd', 'recompute'"),
        gauss_newton(given.module, given.loss_fn, given.batches, engine),
    ):
        pass


class Hidden(torch.autograd.Function):
    """x^3 whose derivative is that of x^3, but whose backward is hidden from autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (3 * x**2 * gradient).detach()


def test_a_backward_that_autograd_does_not_see_into_is_found_by_asymmetry():
    module = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()

    def loss_fn(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module[1](Hidden.apply(module[0](batch[0]))), batch[1])

    with (
        pytest.raises(MeasurementError, match=r"not symmetric.*loss_fn\(module, batch\)"),
        gauss_newton(module, loss_fn, [in_double(mlp().whole)]),
    ):
        pass


def test_a_kernel_without_double_backward_is_refused_with_the_remedy():
    given = fused_attention()
    with (
        pytest.raises(MeasurementError, match=r"gauss_newton.*Replace the operation"),
        gauss_newton(given.module, given.loss_fn, given.batches),
    ):
        pass


def test_a_saturated_loss_is_no_reason_to_refuse():
    """Of probabilities of 1 - 1e-6 little is left in float32 but rounding."""
    given = mlp()
    inputs, _ = given.whole
    with torch.no_grad():
        given.module[2].weight.mul_(40)
        targets = given.module(inputs).argmax(-1)
    with gauss_newton(given.module, cross_entropy, [(inputs, targets)]) as operator:
        assert operator.matvec(torch.randn(operator.size)).isfinite().all()


def test_a_loss_without_parameters_is_refused():
    module = nn.Linear(2, 1)
    with (
        pytest.raises(MeasurementError, match="does not depend on any selected parameter"),
        gauss_newton(module, lambda m, b: F.mse_loss(b, b + 1), [torch.randn(4, 2)]),
    ):
        pass

"""Losses that an engine cannot differentiate twice are refused in words, or done by differences."""

from __future__ import annotations

import pytest
import torch
from support.operators import (
    ENGINES,
    PartlyCurved,
    as_matrix,
    departure,
    hessian,
    in_precision,
    reference,
)
from support.references import (
    dense_hessian,
    dot_product_attention,
    finite_difference_hessian,
    fused_attention,
    mlp,
)
from torch import nn

from lightning_hessian.results import MeasurementError


def test_an_unknown_engine_is_refused():
    given = mlp()
    with (
        pytest.raises(ValueError, match=r"'fast'.*'linearize'"),
        hessian(given.module, given.loss_fn, given.batches, "fast"),
    ):
        pass


def product_of(module, loss_fn, batches, engine, **options):
    with hessian(module, loss_fn, batches, engine, **options) as operator:
        return operator.matvec(torch.randn(operator.size))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forced_fused_attention_kernel_is_named_with_the_remedy(engine):
    given = fused_attention()
    with pytest.raises(MeasurementError, match=r"fused kernel.*MATH") as caught:
        product_of(given.module, given.loss_fn, given.batches, engine)
    assert len(str(caught.value)) < 500


def test_auto_says_why_it_falls_back_to_finite_differences():
    given = fused_attention()
    free = dot_product_attention().module
    free.load_state_dict(given.module.state_dict())
    expected = dense_hessian(free, given.loss_fn, given.whole)
    measured = hessian(given.module, given.loss_fn, given.batches)
    with pytest.warns(UserWarning, match=r"(?i)finite differences.*fused kernel.*MATH"):
        operator = measured.__enter__()
    assert operator.engine == "finite_difference"
    assert departure(operator, expected) < 1e-2
    measured.__exit__(None, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "multihead_attention", "lstm", "batch_norm_in_training"])
def test_finite_differences_are_as_good_as_their_rounding(name, dtype):
    given, expected = reference(name)
    module, batches = in_precision(given, dtype)
    with hessian(module, given.loss_fn, batches, "finite_difference", mode=given.mode) as operator:
        assert departure(operator, expected) < 100 * torch.finfo(dtype).eps ** (2 / 3)
        assert operator.self_check_error < 0.01


class OnceDifferentiable(torch.autograd.Function):
    """As many custom kernels are: PyTorch ends the graph there without a word."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class KernelBackward(torch.autograd.Function):
    """A backward by a kernel that autograd does not see into (Triton, a C++ extension)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


@pytest.mark.filterwarnings("ignore:Finite differences")
@pytest.mark.parametrize("engine", ["auto", "autograd", "recompute"])
@pytest.mark.parametrize("function", [OnceDifferentiable, KernelBackward])
def test_an_operation_without_second_derivative_is_never_silently_left_out(function, engine):
    def loss(square):
        return lambda module, x: square(module(x)).square().mean()

    module, x = nn.Linear(3, 1), torch.randn(4, 3)
    expected = dense_hessian(module, loss(torch.square), x)
    try:
        with hessian(module, loss(function.apply), [x], engine) as operator:
            assert departure(operator, expected) < 0.01
    except MeasurementError:
        pass  # refused


def branching(module, x):
    output = module(x)
    return output.square().mean() if float(output.detach().sum()) > 0 else output.cos().mean()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_loss_that_looks_at_values_is_differentiated(engine):
    """At a point its branch is fixed, so that a trace may follow it."""
    module, x = nn.Linear(3, 1), torch.randn(4, 3)
    options = {"expected_products": 10**9}
    with hessian(module, branching, [x], engine, **options) as operator:
        matrix = as_matrix(operator).double()
    expected = finite_difference_hessian(module, branching, x)
    assert float((matrix - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_detached_loss_is_named(engine):
    def loss(module, x):
        return module(x).square().mean().detach()

    with pytest.raises(MeasurementError, match="not detached"):
        product_of(nn.Linear(3, 1), loss, [torch.randn(4, 3)], engine)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_selection_that_the_loss_does_not_use_is_named(engine):
    with pytest.raises(MeasurementError, match="does not depend on any selected parameter"):
        product_of(PartlyCurved(), None, mlp().batches, engine, parameters="unused.*")


@pytest.mark.parametrize("engine", ["auto", "autograd", "recompute"])
def test_a_loss_that_differentiates_inside_has_a_hessian(engine):
    def residual(module, x):
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad(module(x).sum(), x, create_graph=True)[0]
        return (slope - x).square().mean()

    module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 1)
    expected = finite_difference_hessian(module, residual, x)
    with hessian(module, residual, [x], engine, expected_products=10**9) as operator:
        assert departure(operator, expected) < 1e-5

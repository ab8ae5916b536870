"""What has no spectrum is refused in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from support.references import (
    cross_entropy,
    finite_difference_hessian,
    fused_attention,
    mlp,
    problem,
)
from torch import nn

from lightning_hessian import MeasurementError, hessian_spectrum
from lightning_hessian.measure.budget import Budget


def measure(module=None, loss_fn=cross_entropy, batches=None, **options):
    given = mlp()
    return hessian_spectrum(
        given.module if module is None else module,
        loss_fn,
        given.batches if batches is None else batches,
        **({"num_eigenvalues": 2} | options),
    )


def short(error) -> bool:
    """Whether a message is two lines of a terminal at most, give or take a path."""
    return len(str(error.value)) < 500 and str(error.value).count("\n") < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"parameters": "nothing.*"}, r"'nothing\.\*' matches no parameter"),
        ({"num_eigenvalues": 58}, r"num_eigenvalues=58.*57 numbers.*1 to 57"),
        ({"num_eigenvalues": 0}, "num_eigenvalues=0.*at least 1"),
        ({"budget": Budget(products=17)}, r"products=17.*too small.*18 products"),
        ({"trace_probes": 1}, "at least 2"),
        ({"trace_probes": -3}, "trace_probes"),
        ({"hvp": "fast"}, "'fast'"),
        ({"loss_options": "test"}, "loss_options='test'.*LossOptions"),
        ({"loss_fn": None}, "training_step"),
        ({"module": nn.Linear(5, 3).requires_grad_(False)}, "requires grad"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        measure(**options)
    assert short(caught)


@pytest.mark.parametrize("hvp", ["auto", "linearize", "autograd", "recompute"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda module, batch: module(batch[0]).mean() * math.nan, "is nan.*learning rate"),
        (lambda module, batch: module(batch[0]).mean() / 0, "is (-?inf|nan)"),
        (lambda module, batch: cross_entropy(module, batch).detach(), "not detached"),
        (lambda module, batch: module(batch[0]).square().mean(1), "not a scalar.*mean loss"),
        (lambda module, batch: cross_entropy(module, batch).item(), "float.*not a scalar"),
    ],
    ids=["nan", "inf", "detached", "vector", "float"],
)
def test_losses_without_hessian_are_named(loss_fn, message, hvp):
    with pytest.raises(MeasurementError, match=message) as caught:
        measure(loss_fn=loss_fn, hvp=hvp)
    assert short(caught)


def test_a_second_derivative_that_is_not_finite_is_named():
    """The value and slope of abs(x)^1.5 exist at 0, its curvature does not."""
    module = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        module.weight.zero_()

    def loss(module, x):
        return module.weight.abs().pow(1.5).sum() + module(x).square().mean()

    with pytest.raises(MeasurementError, match="NaN or infinite"):
        measure(module, loss, [torch.randn(4, 3)], num_eigenvalues=1, hvp="recompute")


@pytest.mark.parametrize("hvp", ["linearize", "autograd", "recompute"])
def test_a_forced_fused_attention_kernel_is_named_with_the_remedy(hvp):
    given = fused_attention()
    with pytest.raises(MeasurementError, match=r"fused kernel.*MATH") as caught:
        measure(given.module, given.loss_fn, given.batches, hvp=hvp)
    assert short(caught)


def test_attention_that_may_choose_its_kernel_is_measured():
    given = problem("dot_product_attention")
    exact = scipy.linalg.eigvalsh(given.hessian().numpy())[::-1][:3]
    found = measure(given.module, given.loss_fn, given.batches, num_eigenvalues=3)
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-4)


def test_a_loss_that_differentiates_inside_is_measured():
    """Physics-informed losses and gradient penalties call ``torch.autograd.grad`` themselves."""

    def residual(module, x):
        x = x.clone().requires_grad_()
        slope = torch.autograd.grad(module(x).sum(), x, create_graph=True)[0]
        return (slope - x).square().mean()

    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 1)
    exact = scipy.linalg.eigvalsh(finite_difference_hessian(module, residual, x).numpy())[::-1][:3]
    found = measure(module, residual, [x], num_eigenvalues=3)
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-4)

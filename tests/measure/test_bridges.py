"""A criterion for a loss; calls as other libraries take them, answered with the one to write."""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import (
    ArgumentError,
    HessianSpectrumCallback,
    Session,
    block_structure,
    gradient_structure,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.probe.criterion import CriterionLoss, is_criterion

torch.manual_seed(0)
X, Y = torch.randn(60, 5), torch.randint(3, (60,))
NET = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
LOADER = DataLoader(TensorDataset(X, Y), batch_size=15)
CRITERION = nn.CrossEntropyLoss()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def named(logits, labels):
    return cross_entropy(logits, labels)


def annotated(a: Tensor, b: Tensor) -> Tensor:
    return cross_entropy(a, b)


class Smoothed(nn.Module):
    def forward(self, a, b):
        return cross_entropy(a, b)


CRITERIA = [CRITERION, cross_entropy, named, annotated, Smoothed(), functools.partial(named)]


@pytest.mark.parametrize(
    "criterion", CRITERIA, ids=lambda one: getattr(one, "__name__", type(one).__name__)
)
def test_a_criterion_gives_what_the_loss_function_gives(criterion: Any) -> None:
    expected = hessian_spectrum(NET, loss_fn, LOADER, num_eigenvalues=5)
    found = hessian_spectrum(NET, criterion, LOADER, num_eigenvalues=5)
    np.testing.assert_array_equal(found.eigenvalues, expected.eigenvalues)
    assert found.loss == expected.loss


def test_every_measuring_function_takes_a_criterion() -> None:
    def parts(loss: Any) -> list[Any]:
        with Session(NET, loss, LOADER) as session:
            product = session.operator().matvec(torch.ones(39))
        return [
            block_structure(NET, loss, LOADER).frobenius,
            layer_spectra(NET, loss, LOADER, num_eigenvalues=3)["0"].eigenvalues,
            gradient_structure(NET, loss, LOADER, batch_size=2).covariance,
            product.numpy(),
        ]

    for found, expected in zip(parts(CRITERION), parts(loss_fn), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert isinstance(HessianSpectrumCallback(loss_fn=CRITERION).loss_fn, CriterionLoss)


def test_a_gauss_newton_matrix_sees_the_loss_in_a_criterion() -> None:
    found = hessian_spectrum(NET, CRITERION, LOADER, num_eigenvalues=5, matrix="gauss_newton")
    outputs = NET(X).detach()
    jacobian = torch.func.jacrev(
        lambda p: torch.func.functional_call(NET, p, (X,))
    )(dict(NET.named_parameters()))  # fmt: skip
    rows = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2)
    p = outputs.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = torch.einsum("nip,nij,njq->pq", rows, curvature, rows) / len(X)
    expected = torch.linalg.eigvalsh(dense.double()).flip(0)[:5]
    np.testing.assert_allclose(found.eigenvalues, expected.detach(), rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda model, batch: 0.0,
        lambda a, b: 0.0,
        lambda net, y: 0.0,
        lambda outputs, batch: 0.0,
        lambda batch: 0.0,
        lambda *both: 0.0,
    ],
)
def test_what_says_nothing_or_names_a_model_is_a_loss_function(function: Any) -> None:
    assert not is_criterion(function)


def test_a_module_that_takes_model_and_batch_is_a_loss_function() -> None:
    class Whole(nn.Module):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return loss_fn(model, batch)

    expected = hessian_spectrum(NET, loss_fn, LOADER, num_eigenvalues=3)
    found = hessian_spectrum(NET, Whole(), LOADER, num_eigenvalues=3)
    np.testing.assert_array_equal(found.eigenvalues, expected.eigenvalues)


def test_the_loss_of_a_criterion_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(CriterionLoss(CRITERION)))
    assert again(NET, (X, Y)) == loss_fn(NET, (X, Y))


@pytest.mark.parametrize(
    ("criterion", "batches", "words"),
    [
        (CRITERION, [X], "batches that are (inputs, targets)"),
        (CRITERION, [(X, Y, Y)], "holds 3 things"),
        (CRITERION, [{"x": X, "y": Y}], "this dict holds no pair"),
        (nn.CrossEntropyLoss(reduction="sum"), LOADER, "reduction='mean'"),
        (nn.CrossEntropyLoss(reduction="none"), LOADER, "reduction='mean'"),
        (nn.CrossEntropyLoss, LOADER, "give an instance, CrossEntropyLoss()"),
    ],
)
def test_a_criterion_that_cannot_serve_is_refused(criterion: Any, batches: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        hessian_spectrum(NET, criterion, batches, num_eigenvalues=3)


FUNCTIONS = [hessian_spectrum, block_structure, layer_spectra, gradient_structure]
Call = Callable[[Callable[..., Any]], Any]
PEERS: dict[str, tuple[Call, str]] = {
    "criterion first": (lambda f: f(CRITERION, NET, LOADER), "the model comes first"),
    "hessian-eigenthings": (lambda f: f(NET, LOADER, CRITERION, 5), "the loss comes second"),
    "hessian-eigenthings, function": (lambda f: f(NET, LOADER, loss_fn, 5), "comes second"),
    "PyHessian, data": (
        lambda f: f(NET, CRITERION, data=(X, Y)),
        r"list( of pairs|: )",
    ),
    "PyHessian, pair": (lambda f: f(NET, CRITERION, (X, Y)), r"\[\(inputs, targets\)\]"),
    "PyHessian, loader": (lambda f: f(NET, CRITERION, dataloader=LOADER), "comes third"),
    "PyHessian, names": (lambda f: f(NET, criterion=CRITERION, data=LOADER), "comes second"),
    "curvlinops": (
        lambda f: f(NET, CRITERION, list(NET.parameters()), LOADER),
        "choose some by their names",
    ),
    "curvlinops, named": (
        lambda f: f(NET, CRITERION, dict(NET.named_parameters()), LOADER),
        "choose some by their names",
    ),
    "a number": (lambda f: f(NET, CRITERION, LOADER, 10), "given by name"),
    "no loss": (lambda f: f(NET, LOADER), "None for the module's own training_step"),
    "nothing but a model": (lambda f: f(NET), "misses loss_fn and"),
    "nothing": (lambda f: f(), "misses model and loss_fn and"),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("peer", PEERS)
def test_a_call_in_another_order_is_answered_with_the_one_to_write(
    peer: str, function: Any
) -> None:
    call, words = PEERS[peer]
    with pytest.raises(TypeError, match=words) as caught:  # an ArgumentError is one
        call(function)
    third = "data" if function is gradient_structure else "batches"
    assert f"Write {function.__name__}(model, loss_fn, {third})" in str(caught.value)
    assert "takes" not in str(caught.value).split(".")[0], "Python's own message"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_n": 3}, "Write hessian_spectrum(model, loss_fn, batches, num_eigenvalues=3)."),
        ({"num_eigenthings": 3}, "batches, num_eigenvalues=3)."),
        ({"max_steps": 50}, "batches, budget=Budget(products=50))."),
        ({"mode": "train"}, "batches, loss_options=LossOptions(mode='train'))."),
        ({"params": list(NET.parameters())}, "batches, parameters='<names>')."),
        ({"cuda": True}, "Leave it out"),
        ({"num_eigenvaluess": 3}, "nearest: num_eigenvalues"),
    ],
)
def test_an_argument_of_another_library_is_answered_with_ours(arguments: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        hessian_spectrum(NET, CRITERION, LOADER, **arguments)


def test_what_has_one_meaning_is_not_refused() -> None:
    """A list of two tensors is two batches, and a model without a criterion's name is no loss."""
    batches = [torch.randn(4, 5), torch.randn(4, 5)]
    found = hessian_spectrum(
        NET, lambda model, batch: model(batch).square().mean(), tuple(batches), num_eigenvalues=2
    )
    assert found.num_samples == 8

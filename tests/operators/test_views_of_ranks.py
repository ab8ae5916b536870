"""Views of the Hessian by two ranks, against the blocks of the dense Hessian by another hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.gauss_newton_oracle import dense_gauss_newton, softmax_curvature
from support.launching import run_torchrun
from support.references import dense_hessian, trainable
from support.view_job import ENGINES, GAUSS_NEWTON_ENGINES, VIEWS, Net, loss_fn, samples

CASES = [(how, engine) for how, engines in ENGINES.items() for engine in engines]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What two ranks found."""
    return run_torchrun("view_job.py", tmp_path_factory.mktemp("views") / "found.json")


def block(names):
    """The rows and columns of the dense Hessian that belong to some tensors."""
    module = Net()
    hessian = dense_hessian(module, loss_fn, samples()).numpy()
    owners = [name for name, p in trainable(module).items() for _ in range(p.numel())]
    chosen = np.isin(owners, names)
    return hessian[np.ix_(chosen, chosen)]


@pytest.mark.parametrize(("how", "engine"), CASES)
def test_a_view_over_two_ranks_is_the_block_of_the_dense_hessian(seen, how, engine):
    found = seen["found"][how][engine]
    tolerance = 1e-7 if engine == "finite_difference" else 1e-12
    for name, names in VIEWS.items():
        np.testing.assert_allclose(found[name], block(names), atol=tolerance, err_msg=name)
    assert found["again"] == found["late"]
    if "nested" in found:
        np.testing.assert_allclose(found["nested"], block(VIEWS["late"]), atol=tolerance)


@pytest.mark.parametrize(("how", "engine"), CASES)
def test_products_of_views_are_those_of_the_whole(seen, how, engine):
    sizes = [len(block(names)) for names in VIEWS.values()]
    nested = len(block(VIEWS["late"])) if how == "shared batches" else 0
    assert seen["found"][how][engine]["num_products"] == sum(sizes) + nested


def gauss_newton_block(names):
    """The rows and columns of the dense Gauss-Newton matrix that belong to some tensors."""
    module, (inputs, _) = Net(), samples()
    expected = dense_gauss_newton(
        module,
        inputs,
        lambda z: softmax_curvature(z.view(-1, 3), torch.ones(len(inputs)).double() / len(inputs)),
    ).numpy()
    owners = [name for name, p in trainable(module).items() for _ in range(p.numel())]
    chosen = np.isin(owners, names)
    return expected[np.ix_(chosen, chosen)]


@pytest.mark.parametrize("engine", GAUSS_NEWTON_ENGINES)
@pytest.mark.parametrize("how", ["shared batches", "sharded parameters"])
def test_two_ranks_find_the_dense_gauss_newton_matrix(seen, how, engine):
    found = seen["found"]["gauss_newton"][how][engine]
    for name, names in VIEWS.items():
        np.testing.assert_allclose(found[name], gauss_newton_block(names), atol=1e-12)


def test_both_ranks_find_the_same(seen):
    assert seen["same"]

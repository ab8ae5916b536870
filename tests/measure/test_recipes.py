"""Published procedures under one name: what they select, and what they come to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.references import dense_hessian
from torch import nn
from torch.nn import functional as F

from lightning_hessian import HessianSpectrumCallback, hessian_spectrum
from lightning_hessian.measure.options import PooledSLQ
from lightning_hessian.measure.recipes import hpl_language_model
from lightning_hessian.results import ArgumentError


class Tiny(nn.Module):
    """Two blocks, and a head that may be tied to the embedding."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 7, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def loss(module, batch):
    module = getattr(module, "inner", module)
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())


class Wrapper(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner


def selected(module, recipe):
    return [name for name, p in module.named_parameters() if recipe["parameters"](name, p)]


def test_the_last_layer_is_the_head_or_the_last_block():
    model = Tiny()
    assert selected(model, hpl_language_model(model)) == ["head.weight", "head.bias"]
    block = hpl_language_model(model, layer="block")
    assert selected(model, block) == ["blocks.1.weight", "blocks.1.bias"]
    around = selected(Wrapper(model), hpl_language_model(model))
    assert around == ["inner.head.weight", "inner.head.bias"]
    tied = Tiny(tied=True)
    assert selected(tied, hpl_language_model(tied)) == ["embedding.weight"]


def test_a_model_that_knows_its_head_is_asked():
    model = Tiny()
    model.get_output_embeddings = lambda: model.blocks[0]
    assert selected(model, hpl_language_model(model)) == ["blocks.0.weight", "blocks.0.bias"]


def test_pooled_values_are_those_of_the_last_layer_three_times_over():
    """35 parameters: each run ends with the whole spectrum, and the list holds it once for each."""
    torch.manual_seed(0)
    model = Tiny().double()
    batch = (torch.randint(7, (16, 5)), torch.randint(7, (16, 5)))
    names = ["head.weight", "head.bias"]
    matrix = dense_hessian(model, loss, batch, names).detach()
    exact = torch.linalg.eigvalsh(matrix).flip(0).numpy()
    recipe = hpl_language_model(model)
    assert recipe["protocol"] == PooledSLQ(3, 1000)
    given = {**recipe, "num_eigenvalues": 9}
    found = hessian_spectrum(model, loss, [batch], trace_probes=0, **given)
    np.testing.assert_allclose(found.eigenvalues, np.repeat(exact[:3], 3), rtol=1e-8)
    converged = {**hpl_language_model(model, pooled=False), "num_eigenvalues": 9}
    found = hessian_spectrum(model, loss, [batch], trace_probes=0, tol=1e-8, **converged)
    np.testing.assert_allclose(found.eigenvalues, exact[:9], rtol=1e-8)


def test_the_callback_takes_it():
    model = Tiny()
    callback = HessianSpectrumCallback(loss_fn=loss, **hpl_language_model(model))
    assert callback.num_eigenvalues == 1000


def test_a_model_without_the_layer_is_told():
    with pytest.raises(ArgumentError, match="no linear layer"):
        hpl_language_model(nn.Embedding(3, 2))
    with pytest.raises(ArgumentError, match="ModuleList"):
        hpl_language_model(nn.Linear(3, 2), layer="block")
    with pytest.raises(ArgumentError, match="requires grad"):
        hpl_language_model(Tiny().requires_grad_(False))
    with pytest.raises(ArgumentError, match="layer='last'"):
        hpl_language_model(Tiny(), layer="last")

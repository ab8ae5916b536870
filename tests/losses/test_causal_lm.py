"""The loss of causal language models without their logits, against the models' own loss."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from support.references import dense_hessian
from torch import nn
from torch.nn import functional as F

from lightning_hessian import hessian_spectrum
from lightning_hessian.losses import causal_lm_loss
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

VOCABULARY, WIDTH = 9, 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class TinyForCausalLM(nn.Module):
    """A model with Hugging Face's conventions, whose last layer is tied to its embedding."""

    cap, penalty = None, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.dropout = nn.Dropout(0.5)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.dropout(self.body(self.embedding(input_ids))[0]))
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = loss + self.penalty
        return SimpleNamespace(loss=loss, logits=logits)


class Lit(L.LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch):
        return self.model(**batch).loss


def ragged(kind=dict):
    """Three sequences, filled up, of which one begins with tokens that do not count."""
    ids = torch.randint(VOCABULARY, (3, 8))
    labels = ids.clone()
    labels[0, 5:] = labels[1, :3] = -100
    return kind({"input_ids": ids, "labels": labels})


def own_loss(module, batch):
    return getattr(module, "model", module)(**batch).loss


def test_loss_and_hessian_are_those_of_the_model():
    module, batch = TinyForCausalLM().double().eval(), ragged()
    found = causal_lm_loss(module, batch, chunk_size=5)
    torch.testing.assert_close(found, own_loss(module, batch), rtol=1e-12, atol=0)
    expected = dense_hessian(module, own_loss, batch)
    for engine in ("autograd", "recompute"):
        space = ParameterSpace.select(module, None)
        objective = Objective(module, causal_lm_loss, [batch], space)
        with objective.isolated():
            operator = HessianOperator(objective, engine)
            matrix = operator.matmat(torch.eye(len(expected), dtype=torch.float64))
        assert float((matrix - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_it_finds_the_model_in_a_lightning_module(kind):
    module, batch = Lit(TinyForCausalLM()).eval(), ragged(kind)
    spectra = [
        hessian_spectrum(module, loss, [batch], num_eigenvalues=2, tol=1e-5, trace_probes=0)
        for loss in (causal_lm_loss, None)
    ]
    assert spectra[0].eigenvalues == pytest.approx(spectra[1].eigenvalues, rel=1e-4)


def test_the_model_is_left_as_it_was():
    module, batch = TinyForCausalLM().eval(), ragged()
    before = dict(vars(module.lm_head))
    state = torch.get_rng_state()
    causal_lm_loss(module, batch)
    assert dict(vars(module.lm_head)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_as_it_does_in_the_model():
    module, batch = TinyForCausalLM().train(), ragged()
    torch.manual_seed(1)
    found = causal_lm_loss(module, batch)
    torch.manual_seed(1)
    torch.testing.assert_close(found, own_loss(module, batch))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"cap": 30.0}, "scales or caps"), ({"penalty": 0.1}, "added to the loss")],
)
def test_a_model_that_does_more_is_refused(change, said):
    """A cap of 30 does not show in the loss of a model whose logits are of order one."""
    module = TinyForCausalLM().eval()
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(MeasurementError, match=said):
        causal_lm_loss(module, ragged())


def test_what_it_cannot_serve_is_told():
    module, batch = TinyForCausalLM().eval(), ragged()
    with pytest.raises(MeasurementError, match="holds no tensor 'labels'"):
        causal_lm_loss(module, {"input_ids": batch["input_ids"]})
    with pytest.raises(MeasurementError, match="holds no model"):
        causal_lm_loss(nn.Linear(2, 2), batch)
    module.get_output_embeddings = lambda: nn.Sequential(module.lm_head)
    with pytest.raises(MeasurementError, match=r"not a plain nn\.Linear"):
        causal_lm_loss(module, batch)


def test_a_batch_without_a_label_that_counts_has_no_loss():
    module, batch = TinyForCausalLM().eval(), ragged()
    batch["labels"][:] = -100
    assert causal_lm_loss(module, batch).isnan()
    assert own_loss(module, batch).isnan()

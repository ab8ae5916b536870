"""Batches weigh by what their loss is a mean over: split however, H is that of the whole."""

from __future__ import annotations

import warnings
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_hessian import hessian_spectrum
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.probe.batch_weight import predicts_next

VOCABULARY, LENGTHS = 7, (2, 3, 12, 5, 4, 9)


class Base(nn.Module):
    """A language model with Hugging Face's conventions: ``labels``, -100, a mean over tokens."""

    shift = False

    def __init__(self, **config: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.head = nn.Linear(4, VOCABULARY)
        self.config = SimpleNamespace(is_encoder_decoder=False, is_decoder=False, **config)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids).cumsum(1))
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss)


class TinyForCausalLM(Base):
    shift = True


class TinyLMHeadModel(Base):
    shift = True


class TinyForTokenClassification(Base):
    pass


class TinyForMaskedLM(Base):
    pass


class TinyForConditionalGeneration(Base):
    """An encoder-decoder, whose decoder says of itself that it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.config.is_encoder_decoder = True
        self.decoder = nn.Identity()
        self.decoder.config = SimpleNamespace(is_decoder=True, is_encoder_decoder=False)


class Nameless(Base):
    """Only its configuration says that it predicts the next token."""

    shift = True

    def __init__(self) -> None:
        super().__init__(architectures=["GPT2LMHeadModel"])


class Decoder(Base):
    shift = True

    def __init__(self) -> None:
        super().__init__()
        self.config.is_decoder = True


class Wrapped(nn.Module):
    """As PEFT, compiled modules and LightningModules wrap a model."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": TinyForCausalLM()})

    def forward(self, **batch):
        return self.base_model["model"](**batch)


class Encoding(UserDict):
    """As a BatchEncoding."""


MODULES = [
    TinyForCausalLM, TinyLMHeadModel, TinyForTokenClassification, TinyForMaskedLM,
    TinyForConditionalGeneration, Nameless, Decoder, Wrapped, Base,
]  # fmt: skip


def padded(lengths, kind=dict):
    """Sequences of several lengths, filled up with -100 to the longest."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = torch.randint(VOCABULARY, ids.shape, generator=generator)
    for row, length in enumerate(lengths):
        ids[row, length:], labels[row, length:] = 0, -100
    given = {"input_ids": ids, "labels": labels}
    return SimpleNamespace(**given) if kind is SimpleNamespace else kind(given)


def part(whole, rows, length):
    return {name: tensor[rows, :length] for name, tensor in whole.items()}


def dense_eigenvalues(module, loss) -> np.ndarray:
    """Eigenvalues of the Hessian by double backward, parameter by parameter."""
    parameters = list(module.parameters())
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [
        torch.cat(
            [
                h.reshape(-1)
                for h in torch.autograd.grad(
                    entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            ]
        )
        for entry in flat
    ]
    return np.linalg.eigvalsh(torch.stack(rows).detach().numpy())[::-1]


@pytest.mark.parametrize("kind", [dict, Encoding, SimpleNamespace])
@pytest.mark.parametrize("module", MODULES, ids=lambda kind: kind.__name__)
def test_masked_tokens_weigh_as_in_one_batch(module, kind):
    torch.manual_seed(0)
    model, whole = module().double(), padded(LENGTHS)
    batches = [
        part(whole, slice(0, 2), 3),
        part(whole, slice(2, 3), 12),
        part(whole, slice(3, 6), 9),
    ]
    given = [
        SimpleNamespace(**batch) if kind is SimpleNamespace else kind(batch) for batch in batches
    ]

    def loss(model, batch):
        batch = vars(batch) if kind is SimpleNamespace else dict(batch)
        return model(**batch).loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = hessian_spectrum(
            model, loss, given, num_eigenvalues=3, trace_probes=0, tol=1e-9, hvp="autograd"
        )
    exact = dense_eigenvalues(model, model(**whole).loss)
    np.testing.assert_allclose(found.eigenvalues, exact[:3], rtol=1e-8)
    first = len(LENGTHS) if predicts_next(model) else 0
    assert found.num_samples == sum(LENGTHS) - first


def test_one_label_a_sample_that_is_left_out_does_not_count():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    inputs, labels = torch.randn(12, 3).double(), torch.randint(4, (12,))
    labels[[0, 1, 2, 7]] = -100
    batches = [{"x": inputs[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]
    found = hessian_spectrum(
        model, lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]), batches,
        num_eigenvalues=3, trace_probes=0, tol=1e-9, hvp="autograd",
    )  # fmt: skip
    exact = dense_eigenvalues(model, F.cross_entropy(model(inputs), labels))
    np.testing.assert_allclose(found.eigenvalues, exact[:3], rtol=1e-8)


def test_labels_without_a_masked_one_leave_the_number_of_samples():
    model, whole = TinyForCausalLM(), padded((5, 5, 5))
    found = hessian_spectrum(
        model, lambda m, b: m(**b).loss, [whole, whole], num_eigenvalues=1, trace_probes=0
    )
    assert found.num_samples == 6


def test_masked_labels_in_some_batches_only_are_refused():
    batches = [padded((2, 5)), {"input_ids": torch.zeros(2, 5, dtype=torch.int64)}]
    with pytest.raises(ValueError, match=r"batch 1 holds no labels.*batch_weight"):
        hessian_spectrum(Base(), lambda m, b: m(**b).loss, batches, num_eigenvalues=1)


# Sequence first ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=False) -> None:
        super().__init__()
        self.layer = kind(batch_first)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        found = self.layer(x)
        return self.out(found[0] if isinstance(found, tuple) else found)


KINDS = {
    "LSTM": lambda first: nn.LSTM(4, 4, batch_first=first),
    "GRU": lambda first: nn.GRU(4, 4, batch_first=first),
    "RNN": lambda first: nn.RNN(4, 4, batch_first=first),
    "Transformer": lambda first: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=first),
}


def sequence_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_last_batch_of_sequences_changes_nothing(kind, batch_first):
    torch.manual_seed(0)
    model = Recurrent(KINDS[kind], batch_first).double()
    x, y = torch.randn(5, 12, 4).double(), torch.randint(3, (5, 12))
    pieces = [(x[:, :9], y[:, :9]), (x[:, 9:], y[:, 9:])]
    if batch_first:
        pieces = [tuple(t.transpose(0, 1).contiguous() for t in piece) for piece in pieces]
        x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        options = {"num_eigenvalues": 2, "trace_probes": 0, "tol": 1e-8, "hvp": "autograd"}
        one = hessian_spectrum(model, sequence_loss, [(x, y)], **options)
        two = hessian_spectrum(model, sequence_loss, pieces, **options)
    np.testing.assert_allclose(two.eigenvalues, one.eigenvalues, rtol=1e-7)
    assert two.loss == pytest.approx(one.loss, rel=1e-12)
    assert two.num_samples == 12


def test_one_label_a_sequence_tells_the_samples():
    class Last(Recurrent):
        def forward(self, x):
            return super().forward(x)[-1]

    torch.manual_seed(0)
    model = Last(KINDS["LSTM"]).double()
    x, y = torch.randn(5, 12, 4).double(), torch.randint(3, (12,))
    pieces = [(x[:, :9], y[:9]), (x[:, 9:], y[9:])]
    options = {"num_eigenvalues": 2, "trace_probes": 0, "tol": 1e-8, "hvp": "autograd"}
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    one = hessian_spectrum(model, loss, [(x, y)], **options)
    two = hessian_spectrum(model, loss, pieces, **options)
    np.testing.assert_allclose(two.eigenvalues, one.eigenvalues, rtol=1e-7)
    assert two.num_samples == 12


@pytest.mark.parametrize("shapes", [[(6, 32), (6, 8)], [(4, 9), (4, 12), (4, 5)]])
def test_dimensions_that_disagree_about_the_samples_warn_once(shapes):
    """Nothing tells [time, samples] from [samples, time]: what was counted is said."""
    batches = [(torch.randn(*shape, 4), torch.randint(3, shape)) for shape in shapes]
    model = nn.Linear(4, 3)
    with pytest.warns(UserWarning, match="batch_weight") as caught:
        found = hessian_spectrum(model, sequence_loss, batches, num_eigenvalues=1, trace_probes=0)
    assert len([w for w in caught if "batch_weight" in str(w.message)]) == 1
    assert found.num_samples == sum(shape[0] for shape in shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hessian_spectrum(
            model,
            sequence_loss,
            batches,
            num_eigenvalues=1,
            trace_probes=0,
            loss_options=LossOptions(batch_weight=lambda batch: batch[0].shape[1]),
        )


@pytest.mark.parametrize(
    "shapes",
    [
        [((8, 3), (8,)), ((4, 3), (4,))],  # samples and classes
        [((8, 3), (8, 2)), ((4, 3), (4, 2))],
        [((8, 1, 6, 6), (8,)), ((3, 1, 6, 6), (3,))],  # images
        [((8, 5), (8,)), ((8, 9), (8,))],  # sequences of two lengths, one label each
    ],
)
def test_samples_that_come_first_are_counted_without_a_word(shapes):
    batches = [tuple(torch.zeros(shape) for shape in pair) for pair in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = hessian_spectrum(
            nn.Linear(2, 1), lambda m, b: m.weight.square().sum(), batches, num_eigenvalues=1,
            trace_probes=0,
        )  # fmt: skip
    assert found.num_samples == sum(first[0] for first, _ in shapes)

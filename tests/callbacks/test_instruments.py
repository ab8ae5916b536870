"""What else can be measured in the session of a measurement: instruments of a user's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callbacks.tiny_modules import (
    NUM_PARAMETERS,
    NUM_TRAIN,
    Regression,
    dense_eigenvalues,
    samples,
    small_callback,
    train_loader,
    val_loader,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_hessian import ArgumentError, HessianSpectrumCallback
from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure import session as session_module
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.instrument import Absent, Instrument, Scalars
from lightning_hessian.measure.session import Session
from lightning_hessian.measure.spectrum import SpectrumInstrument

MakeTrainer = Callable[..., Any]
TRAIN = samples(NUM_TRAIN, seed=1).tensors


class MeanCurvature:
    """The mean of H's diagonal, by a product for each parameter."""

    name = "mean curvature"
    prefix = "curvature"

    def check(self, model: nn.Module) -> None:
        pass

    def cost(self, session: Session) -> int:
        return session.space.size

    def measure(self, session: Session, allowance: Allowance) -> Scalars:
        operator = session.operator()
        sessions.append(session)
        unit_vectors = torch.eye(operator.size, dtype=operator.dtype)
        diagonal = operator.matmat(unit_vectors).diagonal()
        return Scalars(
            {"mean": diagonal.mean(), "loss": session.loss},  # type: ignore[dict-item] - a tensor
            missing=["The median is left out: nobody wants it."],
        )


sessions: list[Session] = []
"""Those that were measured in."""


class Fails(MeanCurvature):
    name = "failing"
    prefix = "failing"

    def __init__(self, where: str = "measure") -> None:
        self.where = where

    def measure(self, session: Session, allowance: Allowance) -> Any:
        if self.where == "measure":
            raise ZeroDivisionError("a user's slip")
        return Scalars({"wrong": "no number"})  # type: ignore[dict-item]


class Refuses(MeanCurvature):
    def check(self, model: nn.Module) -> None:
        raise ArgumentError("modulus", 3, "This model has none.")


def _fit(make_trainer: MakeTrainer, callback: Any, **arguments: Any) -> tuple[Any, list[str]]:
    """Returns the module as trained, and what was said."""
    torch.manual_seed(0)
    module = Regression()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback, **arguments).fit(module, train_loader(), val_loader())
    return module, [str(warning.message) for warning in caught]


def _columns(logger: CSVLogger) -> list[dict[str, str]]:
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]


# A user's own ---------------------------------------------------------------------------------


def test_the_protocol() -> None:
    for one in (MeanCurvature(), SpectrumInstrument(), BlocksInstrument()):
        assert isinstance(one, Instrument)
    assert not isinstance(Absent(()), Instrument)


def test_it_is_measured_in_the_same_session_and_logged_under_its_prefix(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    sessions.clear()
    callback = small_callback(num_batches=10, blocks=None, instruments=[MeanCurvature()])
    logger = CSVLogger(tmp_path)
    module, said = _fit(make_trainer, callback, logger=logger, max_epochs=2)
    first, last = sessions
    assert first is not last
    trace = dense_eigenvalues(module, *TRAIN).sum()
    row = callback.history[-1]
    assert row["curvature/mean"] == pytest.approx(trace / NUM_PARAMETERS, rel=1e-4)
    assert type(row["curvature/mean"]) is float
    assert row["curvature/loss"] == row["loss"]
    others = NUM_PARAMETERS + row["stability/num_hvps"]
    assert row["num_hvps"] == callback.last_spectrum.num_hvps + others
    logged = [found for found in _columns(logger) if found["curvature/mean"]]
    assert len(logged) == 2
    for found in logged:
        assert found["hessian/lambda_1"]
        assert found["val_loss"]
    assert float(logged[-1]["curvature/mean"]) == pytest.approx(row["curvature/mean"], rel=1e-5)
    # Told once, though it is missing at both measurements.
    assert sum("The median is left out: nobody wants it." in message for message in said) == 1
    assert callback.records["mean curvature"].scalars()["loss"] == row["loss"]


@pytest.mark.parametrize("where", ["measure", "scalars"])
def test_one_that_fails_costs_only_its_own_statistics(
    make_trainer: MakeTrainer, where: str
) -> None:
    given = [Fails(where), MeanCurvature()]
    callback = small_callback(instruments=given, on_error="warn")
    _, said = _fit(make_trainer, callback, max_epochs=3)
    assert len(callback.history) == 3
    for row in callback.history:
        assert {"lambda_1", "block_off_diagonal_ratio", "curvature/mean"} <= row.keys()
        assert not any(key.startswith("failing/") for key in row)
    (message,) = [message for message in said if "failing" in message]
    kind = "ZeroDivisionError: a user's slip" if where == "measure" else "could not convert string"
    assert message.startswith("Step 3: No statistics of failing: ")
    assert kind in message
    with pytest.raises((ZeroDivisionError, ValueError)):
        _fit(make_trainer, small_callback(instruments=given, on_error="raise"))


def test_one_that_does_not_fit_the_model_is_refused_before_training(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(small_callback(instruments=[Refuses()], on_error="warn"))
    with pytest.raises(ArgumentError, match="modulus=3"):
        trainer.fit(Regression(), train_loader(), val_loader())
    assert trainer.global_step == 0


class NoName:
    prefix = "own"

    def measure(self, session: Session, allowance: Allowance) -> Scalars:
        return Scalars({})


class OtherPrefix(MeanCurvature):
    prefix = "own/part"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([MeanCurvature(), MeanCurvature()], "Two instruments have one name"),
        ([SpectrumInstrument(tol=0.1), SpectrumInstrument()], "Two instruments have one name"),
        ([NoName()], "NoName is no instrument: it needs name, prefix"),
        ([MeanCurvature], "is no instrument"),
        ([OtherPrefix()], "'own/part' of OtherPrefix cannot be part of a key"),
        (MeanCurvature(), "Give a list of instruments"),
        ("spectrum", "Give a list of instruments"),
    ],
)
def test_misuse(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^instruments=.*{message}"):
        HessianSpectrumCallback(instruments=given)


# In the place of a built-in -------------------------------------------------------------------


def test_one_with_the_name_of_a_built_in_takes_its_place(make_trainer: MakeTrainer) -> None:
    own = SpectrumInstrument(num_eigenvalues=7, trace_probes=0, density=True)
    callback = HessianSpectrumCallback(
        layers="layer", blocks="layer", num_batches=10, figures=None, on_error="raise",
        time_budget=None, instruments=[own],
    )  # fmt: skip
    assert [one.name for one in callback.instruments] == [
        "spectrum", "layers", "blocks", "stability",
    ]  # fmt: skip
    assert callback.num_eigenvalues == 7
    module, _ = _fit(make_trainer, callback)
    found = callback.last_spectrum
    assert found is not None
    expected = dense_eigenvalues(module, *TRAIN)
    np.testing.assert_allclose(found.eigenvalues, expected[:7], rtol=1e-4, atol=1e-6)
    assert found.trace is None
    assert found.density is not None
    assert found.density.moment(1) == pytest.approx(expected.mean(), rel=1e-4)
    assert "trace" not in callback.history[-1]
    assert "density" in callback.drawings()
    # Layers are measured like the whole, at fewer eigenvalues where they have fewer parameters.
    for layer in callback.last_layers.values():
        assert layer.trace is None
        assert layer.density is None
        assert len(layer.eigenvalues) == min(7, layer.num_parameters)


def test_what_it_leaves_open_is_that_of_the_callback(make_trainer: MakeTrainer) -> None:
    given = [SpectrumInstrument(trace_probes=3), BlocksInstrument("neuron")]
    callback = HessianSpectrumCallback(
        num_eigenvalues=4, parameters="net.2.*", num_batches=10, figures=None, on_error="raise",
        time_budget=None, instruments=given,
    )  # fmt: skip
    module, _ = _fit(make_trainer, callback)
    spectrum, blocks = callback.last_spectrum, callback.last_blocks
    assert spectrum is not None
    hidden = torch.cat([module.net[:2](TRAIN[0]), torch.ones(NUM_TRAIN, 1)], dim=1).double()
    expected = torch.linalg.eigvalsh(2 * hidden.T @ hidden / NUM_TRAIN).flip(0)[:4]
    np.testing.assert_allclose(spectrum.eigenvalues, expected.detach().numpy(), rtol=1e-4)
    assert blocks is None  # a single neuron: it was told, and "layer" was not measured
    assert "block_off_diagonal_ratio" not in callback.history[-1]


# Built once -----------------------------------------------------------------------------------


def test_one_operator_is_built_for_all_that_is_measured(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = session_module.hessian_operator

    def counting(*arguments: Any, **options: Any) -> Any:
        built.append(real(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(session_module, "hessian_operator", counting)
    callback = small_callback(
        layers="layer", blocks="neuron", density=True, time_budget=None,
        instruments=[
            MeanCurvature(),
            BlocksInstrument("neuron", densities=True, density_steps=20, density_probes=1),
        ],
    )  # fmt: skip
    _fit(make_trainer, callback, max_epochs=3)
    assert len(callback.history) == 3
    for row in callback.history:
        wanted = {"lambda_1", "trace", "layers/lambda_1_net_0", "block_heterogeneity"}
        assert {*wanted, "curvature/mean"} <= row.keys()
    assert callback.last_spectrum is not None
    assert callback.last_spectrum.density is not None
    assert len(built) == 3
    # Its products are all that were made; those of layers and blocks are among them.
    assert built[-1].num_products == callback.history[-1]["num_hvps"]


# Training ------------------------------------------------------------------------------------


def test_training_is_the_same_to_the_last_bit(make_trainer: MakeTrainer) -> None:
    callback = small_callback(
        layers="layer", blocks="neuron", density=True, instruments=[MeanCurvature(), Fails()],
        on_error="warn",
    )  # fmt: skip
    found = []
    for callbacks in ([callback], []):
        torch.manual_seed(3)
        module = Regression()
        make_trainer(*callbacks, max_epochs=3).fit(module, train_loader(), val_loader())
        found.append([*module.state_dict().values(), torch.get_rng_state()])
    assert len(callback.history) == 3
    assert all(math.isfinite(row["curvature/mean"]) for row in callback.history)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

"""Layers, densities and the papers' protocol in a training run: what is logged under which key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from callbacks.tiny_modules import (
    NUM_PARAMETERS,
    Regression,
    small_callback,
    train_loader,
    val_loader,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_hessian import hessian_spectrum
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import PooledSLQ

MakeTrainer = Callable[..., Any]


def columns(folder: str | Path) -> set[str]:
    return set((Path(folder) / "metrics.csv").read_text().splitlines()[0].split(","))


def test_each_layer_is_logged_under_its_own_key(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, module = small_callback(layers="layer"), Regression()
    names = [name for name, _ in module.named_parameters()]
    trainer = make_trainer(callback, logger=CSVLogger(tmp_path))
    trainer.fit(module, train_loader(), val_loader())
    found = columns(trainer.logger.log_dir)
    layers = {name.rpartition(".")[0].replace(".", "_") for name in names}
    assert layers == set(callback.last_layers)
    for layer in layers:
        assert {f"layers/lambda_1_{layer}", f"layers/trace_{layer}"} <= found
        spectrum = callback.last_layers[layer]
        row = callback.history[-1]
        assert row[f"layers/lambda_1_{layer}"] == spectrum.eigenvalues[0]
        globs = [name for name in names if name.rpartition(".")[0].replace(".", "_") == layer]
        alone = hessian_spectrum(
            module, None, callback._batches, parameters=globs, num_eigenvalues=5, trace_probes=2
        )
        np.testing.assert_allclose(spectrum.eigenvalues, alone.eigenvalues, rtol=1e-5)
    assert "hessian/lambda_1" in found
    assert all(key.count("/") <= 1 for key in found)
    spent = [s.num_hvps for s in (callback.last_spectrum, *callback.last_layers.values())]
    row = callback.history[-1]
    others = callback.last_blocks.num_hvps + row["stability/num_hvps"]
    assert row["num_hvps"] == sum(spent) + others


def test_layers_that_do_not_fit_are_refused_before_training(make_trainer: MakeTrainer) -> None:
    module = Regression()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for layers, message in (({"a.b": "*"}, "underscores"), ({"a": "no.*"}, "matches no")):
        with pytest.raises(ValueError, match=message):
            make_trainer(small_callback(layers=layers)).fit(module, train_loader(), val_loader())
    assert all((before[name] == value).all() for name, value in module.state_dict().items())


def test_the_whole_comes_first_and_what_is_left_out_is_said(make_trainer: MakeTrainer) -> None:
    callback = small_callback(
        layers="layer", blocks=None, tol=1e-9, time_budget=Budget(products=7 + 16)
    )
    with pytest.warns(UserWarning, match="Layers without a spectrum: net_0, net_2"):
        make_trainer(callback).fit(Regression(), train_loader(), val_loader())
    assert callback.last_spectrum is not None
    assert callback.history[-1]["num_hvps"] <= 7 + 16
    assert not any("/" in key for key in callback.history[-1])


def test_the_papers_protocol_in_training(make_trainer: MakeTrainer) -> None:
    callback = small_callback(
        num_eigenvalues=None, protocol=PooledSLQ(), density=True, blocks=None, trace_probes=0
    )
    assert callback.num_eigenvalues == 1000
    make_trainer(callback).fit(Regression(), train_loader(), val_loader())
    spectrum = callback.last_spectrum
    assert spectrum.protocol == "pooled_slq"
    row = callback.history[-1]
    assert row["num_hvps"] == 3 * NUM_PARAMETERS + row["stability/num_hvps"]
    assert row["num_converged"] == spectrum.num_converged
    assert row["num_fitted"] == (spectrum.eigenvalues > 0).sum()
    assert "density" in callback.drawings()
    assert spectrum.density.size == NUM_PARAMETERS

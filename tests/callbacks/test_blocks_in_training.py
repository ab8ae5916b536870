"""The callback's `blocks=`: what it logs, what it may cost, what it says when it cannot."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from support.callbacks import with_spectrum
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback, MeasurementError, block_structure
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget

WITH_DENSITIES = BlocksInstrument(densities=True, density_steps=20, density_probes=1)


class Classifier(L.LightningModule):
    """Trained by SGD; its parameters are those of ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def two_layers(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def deep(depth: int = 12) -> nn.Module:
    """A layer for every ten parameters or so, 12 + 2 layers in all, n above the exact path."""
    layers = [part for _ in range(depth) for part in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3))


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(32) % 3), batch_size=8)


def fit(
    net: nn.Module, epochs: int = 1, **arguments: Any
) -> tuple[HessianSpectrumCallback, L.Trainer, list[str]]:
    """Trains and returns the callback, the trainer and the warnings that name blocks."""
    defaults = {
        "num_eigenvalues": 3, "num_batches": 2, "on_error": "raise",
        "figures": None,
    }  # fmt: skip
    callback = with_spectrum(**{**defaults, **arguments})
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(net), loader(), loader())
    said = [str(warning.message) for warning in caught]
    return callback, trainer, [message for message in said if "block" in message]


def test_what_is_logged_is_what_block_structure_measures():
    torch.manual_seed(0)
    callback, trainer, said = fit(two_layers(), instruments=[WITH_DENSITIES])
    logged = {k.removeprefix("hessian/"): float(v) for k, v in trainer.callback_metrics.items()}
    blocks = callback.last_blocks
    assert blocks is not None
    again = block_structure(
        trainer.lightning_module, None, callback._batches, densities=True, exact=True
    )
    np.testing.assert_allclose(blocks.frobenius, again.frobenius, rtol=1e-5)
    assert logged["block_off_diagonal_ratio"] == pytest.approx(again.off_diagonal_ratio, rel=1e-5)
    assert logged["block_off_diagonal_share"] == pytest.approx(again.off_diagonal_share, rel=1e-5)
    assert logged["block_heterogeneity"] == pytest.approx(again.mean_heterogeneity, rel=1e-3)
    assert logged["block_off_diagonal_ratio_std_error"] == 0
    shares = [logged[f"block_share_{family}"] for family in ("ww", "wv", "vv")]
    assert shares == pytest.approx(list(again.families.values()), rel=1e-5)
    assert not said
    assert all(re.fullmatch(r"(stability/)?\w+", name, re.ASCII) for name in logged)
    assert callback.history[0]["block_off_diagonal_ratio"] == again.off_diagonal_ratio


def test_products_and_seconds_are_those_of_both():
    started = time.monotonic()
    callback, _, _ = fit(two_layers())
    passed = time.monotonic() - started
    (row,) = callback.history
    assert callback.last_spectrum is not None
    assert callback.last_blocks is not None
    parts = callback.last_spectrum.num_hvps, callback.last_blocks.num_hvps
    assert row["num_hvps"] == sum(parts) + row["stability/num_hvps"]
    seconds = callback.last_spectrum.seconds + callback.last_blocks.seconds
    assert seconds <= row["seconds"] <= passed  # building objective and operator belongs to neither


def test_none_measures_no_blocks():
    callback, trainer, said = fit(two_layers(), blocks=None)
    assert callback.last_blocks is None
    assert not said
    assert not [key for key in trainer.callback_metrics if "block" in key]


@pytest.mark.parametrize("blocks", ["neuron", "class", {"in": "net.0.*", "out": "net.2.*"}],
                         ids=["neuron", "class", "mapping"])  # fmt: skip
def test_other_partitions(blocks):
    callback, _, said = fit(two_layers(), blocks=blocks)
    assert callback.last_blocks is not None
    assert len(callback.last_blocks.names) == {"neuron": 9, "class": 3}.get(str(blocks), 2)
    assert "block_off_diagonal_ratio" in callback.history[0]
    assert ("block_share_wv" in callback.history[0]) == (blocks != "class")
    ratios = {key for key in callback.history[0] if key.startswith("block_ratio_")}
    # Hidden neurons are compared with one another, and classes; whole layers are neither.
    wanted = {"neuron": {"block_ratio_ww", "block_ratio_vv"}, "class": {"block_ratio_vv"}}
    assert ratios == wanted.get(str(blocks), set())
    for name, group in (("block_ratio_ww", "net.0"), ("block_ratio_vv", "net.2")):
        if name in ratios:
            norms = callback.last_blocks.frobenius
            inside = np.array([each == group for each in callback.last_blocks.groups])
            part = norms[np.ix_(inside, inside)]
            off = part[~np.eye(len(part), dtype=bool)].mean()
            assert callback.history[0][name] == pytest.approx(off / np.diag(part).mean())
    assert not said


def test_the_ratio_costs_a_seventh_of_the_measurement():
    """Or what it takes at least, where that is more."""
    callback, _, said = fit(deep(), num_eigenvalues=100, trace_probes=16)
    assert callback.last_blocks is not None
    assert callback.last_spectrum is not None
    assert "block_off_diagonal_ratio" in callback.history[0]
    assert callback.last_blocks.num_hvps <= 0.151 * callback.history[0]["num_hvps"]
    assert not said
    least = 14 * 3
    callback, _, said = fit(deep(), epochs=2)
    for row in callback.history:
        assert row["block_off_diagonal_ratio_std_error"] > 0
    assert callback.last_blocks is not None
    assert callback.last_blocks.num_hvps <= least
    assert not said


def test_heterogeneity_is_left_out_where_it_would_take_too_much():
    callback, _, said = fit(deep(), epochs=2, instruments=[WITH_DENSITIES])
    for row in callback.history:
        assert row["block_off_diagonal_ratio_std_error"] > 0
        assert "block_heterogeneity" not in row
    (message,) = said  # once, in two measurements
    assert re.search(r"block_heterogeneity is left out.*140 products.*Raise", message)


def test_more_eigenvalues_pay_for_the_heterogeneity():
    callback, _, said = fit(
        deep(), num_eigenvalues=50, trace_probes=16, instruments=[WITH_DENSITIES]
    )
    assert "block_heterogeneity" in callback.history[0]
    assert not said
    assert callback.last_blocks is not None
    assert callback.last_spectrum is not None
    assert callback.last_blocks.num_hvps <= 1.5 * callback.last_spectrum.num_hvps


def test_a_bound_on_products_bounds_both_and_the_spectrum_comes_first():
    callback, _, said = fit(deep(), time_budget=Budget(products=20), epochs=2)
    for row in callback.history:
        assert row["num_hvps"] <= 20
        assert "lambda_1" in row
        assert "block_off_diagonal_ratio" not in row
    assert callback.last_blocks is None
    (message,) = said  # the same at both measurements, so told once
    assert re.search(r"14 blocks take at least 42 products.*left 0. Raise the budget", message)
    enough, _, _ = fit(deep(), time_budget=Budget(products=100))
    assert "block_off_diagonal_ratio" in enough.history[0]
    assert enough.history[0]["num_hvps"] <= 100


def test_a_single_layer_leaves_the_key_out_with_a_reason_once():
    callback, _, said = fit(nn.Linear(4, 3), epochs=3)
    assert len(callback.history) == 3
    assert not [key for row in callback.history for key in row if "block" in key]
    (message,) = said
    assert re.search(r"blocks='layer' makes a single block.*blocks='neuron'", message)


def test_a_failure_of_the_blocks_keeps_the_spectrum(monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise MeasurementError("the memory is full. Select fewer parameters.")

    monkeypatch.setattr(BlocksInstrument, "structure", fails)
    callback, _, said = fit(two_layers(), on_error="warn")
    assert "lambda_1" in callback.history[0]
    assert callback.last_blocks is None
    assert "No statistics of blocks: the memory is full. Select fewer parameters." in said[0]
    with pytest.raises(MeasurementError, match="memory is full"):
        fit(two_layers(), on_error="raise")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layers", "blocks='layers'.*one of layer"),
        ("head", "finds nothing to cut"),
        ({"a": "net.7.*"}, "matches no parameter"),
        ({"a": "net.*", "b": "*.bias"}, "overlap"),
        (7, "blocks=7.*mapping"),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_misuse_is_refused_before_training(blocks, message, on_error):
    net = two_layers()
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=message):
        fit(net, blocks=blocks, on_error=on_error)
    assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("blocks", [None, "layer", "neuron"])
def test_training_is_the_same_to_the_bit(blocks):
    """Dropout and shuffling draw from the global generator: a measurement must not."""

    def weights(measured: bool) -> list[Tensor]:
        L.seed_everything(1, verbose=False)
        net = nn.Sequential(nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Dropout(0.3), nn.ReLU(),
                            nn.Linear(20, 20), nn.Linear(20, 3))  # fmt: skip
        callbacks = [
            HessianSpectrumCallback(num_eigenvalues=3, num_batches=2, blocks=blocks, figures=None)
        ]
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False,
            callbacks=callbacks if measured else [], enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        data = DataLoader(loader().dataset, batch_size=8, shuffle=True)
        trainer.fit(Classifier(net), data, loader())
        return list(net.state_dict().values())

    for with_it, without in zip(weights(True), weights(False), strict=True):
        assert torch.equal(with_it, without)


def test_layers_are_drawn_over_the_depth_where_there_are_three() -> None:
    callback, _, _ = fit(deep(2), blocks=None, layers="layer")
    (lowest, *_, highest) = callback.last_layers
    assert (lowest, highest) == ("net_0", "net_5")
    assert "layers" in callback.drawings()
    callback, _, _ = fit(two_layers(), blocks=None, layers="layer")
    assert "layers" not in callback.drawings()

"""The example of an instrument: sharpness within a ball."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lightning_hessian import HessianSpectrumCallback, Instrument, Session

SCRIPT = Path(__file__).parents[2] / "examples" / "instruments" / "sharpness.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sharpness_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sharpness_example", module)
    spec.loader.exec_module(module)
    return module


def test_the_script_runs_as_it_stands(example, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    history = example.main()
    assert len(history) == 6
    assert "epoch 5: rise" in capsys.readouterr().out
    rho = 0.05
    for row in history:
        rise = row["sharpness/rise"]
        # To second order the rise is rho |g| + rho^2 u.Hu / 2, with u.Hu at most lambda_1.
        first = rho * row["sharpness/gradient_norm"]
        assert rise <= 1.05 * (first + rho**2 / 2 * row["lambda_1"])
        assert rise > 0


def test_the_rise_of_a_quadratic_loss_is_known(example) -> None:
    """L(w) = w.A w / 2: a step of rho along g = A w rises by rho |g| + rho^2 g.A g / (2 g.g)."""
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    linear = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        weight = module.weight[0]
        return weight @ batch @ weight / 2

    gradient = matrix @ linear.weight[0].detach()
    curved = float(gradient @ matrix @ gradient / (gradient @ gradient))
    expected = 0.3 * float(gradient.norm()) + 0.3**2 / 2 * curved
    with Session(linear, loss, [matrix]) as session:
        record = example.Sharpness(rho=0.3).measure(session, None)
    assert record.scalars()["rise"] == pytest.approx(expected, rel=1e-12)
    assert record.scalars()["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)


def test_without_a_gradient_there_is_no_rise(example) -> None:
    linear = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(linear.weight)
    with Session(linear, lambda m, b: m(b).square().mean(), [torch.ones(3, 2)]) as session:
        record = example.Sharpness().measure(session, None)
    assert record.scalars() == {}
    assert "no direction" in record.absent()[0]


def test_it_is_an_instrument_and_checked_before_training(example) -> None:
    assert isinstance(example.Sharpness(), Instrument)
    callback = HessianSpectrumCallback(instruments=[example.Sharpness(rho=-1.0)])
    with pytest.raises(ValueError, match=r"rho=-1\.0 must be positive"):
        callback.check(nn.Linear(60, 1))

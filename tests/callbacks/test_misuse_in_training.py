"""No nonsense reaches the first training step: whatever a callback refuses, it refuses before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from callbacks.tiny_modules import Regression, train_loader, val_loader
from support.nonsense import NONSENSE, is_fine, within
from torch.utils.data import DataLoader

from lightning_hessian import ArgumentError, GradientStructureCallback, HessianSpectrumCallback

MakeTrainer = Callable[..., Any]
SMALL: dict[type, dict[str, Any]] = {
    HessianSpectrumCallback: {"num_eigenvalues": 3, "num_batches": 2, "figures": None},
    GradientStructureCallback: {
        "num_gradients": 20, "batch_size": 2, "num_batches": 2, "figures": None, "max_tested": 5,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("callback", "name"),
    [(kind, name) for kind in SMALL for name in inspect.signature(kind).parameters],
)
def test_nonsense_is_refused_before_training(
    make_trainer: MakeTrainer, callback: type, name: str
) -> None:
    parameter = inspect.signature(callback).parameters[name]
    for label, value in NONSENSE.items():
        trainer = make_trainer(num_sanity_val_steps=0)
        try:
            with within(60):
                trainer.callbacks.append(callback(**{**SMALL[callback], name: value}))
                trainer.fit(Regression(), train_loader(), val_loader())
        except ValueError:
            assert trainer.global_step == 0, f"{name}={label} stopped a training that had begun"
        else:
            assert is_fine(callback.__name__, parameter, label), f"{name}={label} is taken"


@pytest.mark.parametrize("data", ["train", "loader"])
def test_a_minibatch_larger_than_all_probe_data_is_refused_before_training(
    make_trainer: MakeTrainer, data: str
) -> None:
    given: str | DataLoader[Any] = train_loader() if data == "loader" else data
    callback = GradientStructureCallback(
        num_gradients=20, batch_size=17, num_batches=2, data=given, figures=None
    )
    trainer = make_trainer(callback)
    with pytest.raises(ArgumentError, match=r"batch_size=17.*hold 16 samples.*num_batches=2"):
        trainer.fit(Regression(), train_loader(), val_loader())
    assert trainer.global_step == 0

"""LightningCLI builds the callback from YAML, that of either package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from callbacks.tiny_modules import in_a_fresh_process

from lightning_hessian import AtSteps, EveryNValidations, HessianSpectrumCallback
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.measure.spectrum import SpectrumInstrument

PACKAGES = {
    "lightning": ("lightning.pytorch", "Regression", "RegressionData"),
    "pytorch_lightning": ("pytorch_lightning", "PlRegression", "PlRegressionData"),
}


def _run(package: str, folder: Path, callbacks: Any) -> Any:
    """Fits what the YAML file says, and returns the CLI."""
    name, module, data = PACKAGES[package]
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": callbacks,
        },
        "model": {"class_path": f"tiny_modules.{module}"},
        "data": {"class_path": f"tiny_modules.{data}"},
    }
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = importlib.import_module(f"{name}.cli")
    return cli.LightningCLI(
        save_config_kwargs={"overwrite": True}, args=["fit", "--config", str(file)]
    )


def budget(**arguments: Any) -> dict[str, Any]:
    """What a YAML file has for a budget."""
    return {"class_path": "lightning_hessian.measure.budget.Budget", "init_args": arguments}


def _callback(cli: Any) -> HessianSpectrumCallback:
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, HessianSpectrumCallback)]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_arguments_arrive(package: str, tmp_path: Path) -> None:
    arguments = {
        "num_eigenvalues": 4,
        "monitor": ["val_loss", "train_loss"],
        "every_n_validations": {
            "class_path": "lightning_hessian.EveryNValidations",
            "init_args": {"n": 2, "during_validate": True},
        },
        "data": "val",
        "num_batches": 1,
        "parameters": ["net.0.*", "net.2.weight"],
        "tol": 0.01,
        "time_budget": budget(products=300, seconds=30.0),
        "figures": None,
        "hvp": "autograd",
        "loss_options": {
            "class_path": "lightning_hessian.measure.options.LossOptions",
            "init_args": {"mode": "train"},
        },
        "basis": {
            "class_path": "lightning_hessian.solvers.storage.BasisStorage",
            "init_args": {"memory": 1e8, "tier": "cpu"},
        },
        "significance": 0.1,
        "instruments": [
            {
                "class_path": "lightning_hessian.measure.spectrum.SpectrumInstrument",
                "init_args": {"trace_probes": 3, "significance": 0.1},
            }
        ],
        "on_error": "raise",
        "seed": 5,
    }
    entry = {"class_path": "lightning_hessian.HessianSpectrumCallback", "init_args": arguments}
    cli = _run(package, tmp_path, [entry])
    callback = _callback(cli)
    (row,) = callback.history
    assert (row["epoch"], row["num_eigenvalues"], row["d_c"]) == (1, 4, 1.22 / 2)
    assert callback.monitors == ("val_loss", "train_loss")
    plain = ("data", "num_batches", "parameters", "figures", "hvp", "significance", "on_error")
    for name in (*plain, "num_eigenvalues", "seed"):
        assert getattr(callback, name) == arguments[name]
    assert callback.schedule == EveryNValidations(2, during_validate=True)
    assert callback.time_budget == Budget(products=300, seconds=30.0)
    assert callback.loss_options == LossOptions(mode="train")
    spectrum = callback.instruments[0]
    assert isinstance(spectrum, SpectrumInstrument)
    assert (spectrum.trace_probes, spectrum.count) == (3, 4)
    assert callback.last_spectrum is not None
    assert callback.last_spectrum.engine == "autograd"
    assert callback.last_spectrum.num_parameters == 30

    # What the CLI saves beside the run builds the same callback again.
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["callbacks"]
    again = _callback(_run(package, tmp_path, saved))
    assert again.last_spectrum is not None
    assert list(again.last_spectrum.eigenvalues) == list(callback.last_spectrum.eigenvalues)


@pytest.mark.parametrize("package", PACKAGES)
def test_defaults_and_a_single_callback(package: str, tmp_path: Path) -> None:
    arguments = {
        "num_eigenvalues": 4,
        "num_batches": 1,
        "time_budget": budget(seconds=30.0),
        "figures": None,
    }
    entry = {"class_path": "lightning_hessian.HessianSpectrumCallback", "init_args": arguments}
    assert len(_callback(_run(package, tmp_path, entry)).history) == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_a_schedule_object(package: str, tmp_path: Path) -> None:
    steps = {"class_path": "lightning_hessian.AtSteps", "init_args": {"steps": [5]}}
    arguments = {
        "num_eigenvalues": 4,
        "time_budget": budget(seconds=30.0),
        "figures": None,
        "every_n_validations": steps,
    }
    entry = {"class_path": "lightning_hessian.HessianSpectrumCallback", "init_args": arguments}
    callback = _callback(_run(package, tmp_path, [entry]))
    assert callback.schedule == AtSteps([5])
    assert [row["step"] for row in callback.history] == [7]


def test_an_unknown_argument_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"num_eigenvalue": 4}
    entry = {"class_path": "lightning_hessian.HessianSpectrumCallback", "init_args": arguments}
    with pytest.raises(SystemExit):
        _run("lightning", tmp_path, [entry])
    assert "num_eigenvalue" in capsys.readouterr().err


ORDERS = {
    "callback made first": """
from lightning_hessian import HessianSpectrumCallback
callback = HessianSpectrumCallback(num_eigenvalues=4)
import pytorch_lightning as pl
""",
    "callback first, then the CLI": """
import lightning_hessian
import pytorch_lightning as pl
from pytorch_lightning.cli import LightningCLI
from callbacks.tiny_modules import PlRegression, PlRegressionData
cli = LightningCLI(PlRegression, PlRegressionData, run=False, save_config_callback=None, args=[
    "--trainer.callbacks=lightning_hessian.HessianSpectrumCallback",
    "--trainer.callbacks.num_eigenvalues=4", "--trainer.logger=false",
])
(callback, *_) = cli.trainer.callbacks
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_whichever_is_imported_first(order: str, tmp_path: Path) -> None:
    fit = """
from callbacks.tiny_modules import PlRegression, PlRegressionData
trainer = pl.Trainer(
    callbacks=callback, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False
)
trainer.fit(PlRegression(), datamodule=PlRegressionData())
assert len(callback.history) == 1
"""
    run = in_a_fresh_process(ORDERS[order] + fit, tmp_path)
    assert run.returncode == 0, run.stderr

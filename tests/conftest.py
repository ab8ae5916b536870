"""Trainers that write nothing but where a test wants it, and a W&B that belongs to the tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Returns ``make(*callbacks, package=..., **arguments)``, a silent Trainer on the CPU."""
    import lightning as L

    def make(*callbacks: Any, package: Any = L, **arguments: Any) -> Any:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return package.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})

    return make


@pytest.fixture(autouse=True)
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice on workers and batch sizes is not what is tested here."""
    with warnings.catch_warnings():
        for topic in (
            ".*does not have many workers.*",
            ".*number of training batches.*",
            ".*infer the `batch_size`.*",
            ".*Checkpoint directory .* exists.*",
        ):
            warnings.filterwarnings("ignore", topic)
        yield


@pytest.fixture(scope="session")
def own_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """W&B without any setting of the user's, offline, and nothing of its runs stays behind."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("wandb_home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            if name != "WANDB_SERVICE":
                monkeypatch.delenv(name)
        for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            monkeypatch.setenv(f"WANDB_{name}", str(home))
        monkeypatch.setenv("WANDB_MODE", "offline")  # put back after what WandbLogger does to it
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield wandb
        wandb.teardown()

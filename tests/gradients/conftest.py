"""A Trainer that writes nothing but where a test wants it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest


@pytest.fixture
def quiet_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Returns ``make(*callbacks, **arguments)``, a silent Trainer on the CPU."""

    def make(*callbacks: Any, **arguments: Any) -> L.Trainer:
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
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})

    return make


@pytest.fixture(autouse=True)
def _without_advice() -> Iterator[None]:
    """Lightning's advice on workers and batch counts is not what is tested here."""
    with warnings.catch_warnings():
        for topic in (
            ".*does not have many workers.*",
            ".*number of training batches.*",
            ".*Checkpoint directory .* exists.*",
        ):
            warnings.filterwarnings("ignore", topic)
        yield

"""A W&B that belongs to the tests, and a Lightning that keeps its advice to itself."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def own_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the user's reaches wandb, and nothing of these runs stays behind."""
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
        yield
        import wandb

        wandb.teardown()


@pytest.fixture(autouse=True)
def _quiet_lightning() -> Iterator[None]:
    with warnings.catch_warnings():
        for topic in (
            ".*does not have many workers.*",
            ".*number of training batches.*",
            ".*Checkpoint directory .* exists.*",
        ):
            warnings.filterwarnings("ignore", topic)
        yield

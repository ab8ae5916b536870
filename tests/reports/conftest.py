"""W&B apart from the user's own, for the tests of reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def wandb_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """W&B without any setting of the user's, and nothing of these runs stays behind."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            if name != "WANDB_SERVICE":
                monkeypatch.delenv(name)
        for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            monkeypatch.setenv(f"WANDB_{name}", str(home))
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield wandb
        wandb.teardown()

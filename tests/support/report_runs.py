"""Runs that the real libraries write, for the tests of reports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.histories.run_table import RunRecord
from support.runs import ended


@contextlib.contextmanager
def recording(folder: Path, **arguments: Any) -> Iterator[Any]:
    """An offline run that wandb writes into ``folder``, finished whatever happens."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    run = wandb.init(mode="offline", dir=str(folder), settings=settings, **arguments)
    try:
        yield run
    finally:
        file = Path(run.dir).parent / f"run-{run.id}.wandb"
        run.finish()
        ended(file)


def logged(seed: int, count: int = 30) -> list[dict[str, float]]:
    """Rows as a training run logs them: two statistics in the row of the monitor."""
    rng = np.random.default_rng(seed)
    loss = np.exp(-np.arange(count) / 10) + 0.05 * rng.normal(size=count) + 1
    return [
        {
            "trainer/global_step": 10 * (k + 1),
            "epoch": k,
            "val_loss": float(loss[k]),
            "hessian/d_ks": float(0.3 * loss[k] + 0.05 * rng.normal()),
            "hessian/lambda_1": float(np.exp(rng.normal())),
        }
        for k in range(count)
    ]


def write_csv_run(folder: Path, rows: list[dict[str, float]], hparams: dict[str, Any]) -> Path:
    """Writes a run with Lightning's own CSVLogger."""
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(folder.parent, name=folder.name, version=0)
    logger.log_hyperparams(hparams)
    for row in rows:
        metrics = {key: value for key, value in row.items() if key != "trainer/global_step"}
        logger.log_metrics(metrics, step=int(row["trainer/global_step"]))
    logger.save()
    return folder / "version_0"


def record(name: str, config=None, steps=None, **columns) -> RunRecord:
    """Returns a run of some columns; ``__`` in a name stands for a slash."""
    columns = {key.replace("__", "/"): np.asarray(v, dtype=float) for key, v in columns.items()}
    size = len(next(iter(columns.values())))
    steps = np.arange(size, dtype=float) if steps is None else np.asarray(steps, dtype=float)
    return RunRecord(name, name, name, "csv", config or {}, steps, columns)

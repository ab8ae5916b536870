"""One number for the step of a measurement: in the loggers' rows, figures, files and pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from callbacks.test_updates import ByHand
from callbacks.tiny_modules import Regression
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.pages import data_of
from support.runs import (
    csv_rows,
    finished,
    measuring_rank_only,
    tensorboard_events,
    train,
    wandb_logger,
)

from lightning_hessian import AtSteps, load_runs
from lightning_hessian.reports.live import live_page
from lightning_hessian.reports.live_runs import offline_run
from lightning_hessian.tracking.loggers import STEP

KEY = "hessian/lambda_1"


class Logs(ByHand):
    """Two optimizers, whose steps the Trainer counts one by one, and a validation loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)
        self.log("train_loss", self.loss(batch))


@pytest.mark.usefixtures("own_wandb")
@pytest.mark.parametrize("module", [Regression, Logs])
def test_every_place_has_the_same(tmp_path: Path, module: Callable[[], Any]) -> None:
    callback = measuring_rank_only(figures=1)
    loggers = [
        wandb_logger(tmp_path),
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="tensorboard"),
    ]
    trained = module()
    trained.callback = callback
    trainer = train(tmp_path, [callback], loggers, module=trained)
    # Two validations an epoch of four batches; Lightning counts the rows of its loggers from 0.
    expected = [1, 3, 5, 7, 9, 11]
    assert trainer.global_step == (24 if module is Logs else 12)
    assert [row["step"] for row in callback.history] == expected
    run, rows = finished(loggers[0], tmp_path), csv_rows(loggers[1])
    folder = Path(loggers[1].log_dir)
    texts = [json.loads(line) for line in (folder / "spectra_hessian.jsonl").open()]
    events = tensorboard_events(loggers[2].log_dir)
    page = data_of(live_page(offline_run(run), ["val_loss"]))
    charts = {c["title"]: c for part in page["sections"] for c in part["charts"]}
    (line,) = charts["Largest eigenvalue"]["series"]
    (tagged,) = [tag for tag in events.Tags()["images"] if "rank" in tag]
    (read,) = load_runs(folder, cache=False)
    places = {
        "rows of the CSV": [row["step"] for row in rows if KEY in row],
        "its validation losses": [row["step"] for row in rows if "val_loss" in row],
        "rows of W&B": [row[STEP] for row in run.rows if KEY in row],
        "figures of W&B": [row[STEP] for row in run.rows if "figures/hessian_rank.path" in row],
        "spectra of W&B": [row[STEP] for row in run.rows if "spectra/hessian" in row],
        "spectra as files": [text["step"] for text in texts],
        "figures as files": sorted(
            int(path.stem.rpartition("_")[2]) for path in folder.glob("figures/*.png")
        ),
        "scalars of TensorBoard": [event.step for event in events.Scalars(KEY)],
        "images of TensorBoard": [event.step for event in events.Images(tagged)],
        "chart of the live page": [x for x, _ in line["points"]],
        "spectra of the live page": [spectrum["step"] for spectrum in page["spectra"]],
        "what a report reads": read.steps[read.series(KEY) > 0].tolist(),
    }  # fmt: skip
    assert places == dict.fromkeys(places, expected)
    title = callback.drawings()["rank"]().axes[0].get_title()
    assert re.findall(r"step (\d+)", title) == ["11"]
    assert page["step"] == 11


def test_schedules_still_count_what_the_optimizers_did(tmp_path: Path) -> None:
    callback = measuring_rank_only(every_n_validations=AtSteps([4, 5]))
    train(tmp_path, [callback], False)
    # The validation after four steps is one for good: the next counts from there.
    assert [row["step"] for row in callback.history] == [3, 5]
    state = callback.state_dict()
    assert state["last_step"] == 6

"""What was measured beside a run joins it by step: in tables, in the report, in the live page."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support import trained
from support.pages import data_of
from support.runs import finished, wandb_logger

from lightning_hessian.cli.main import main
from lightning_hessian.histories.load import load_runs
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.reports.live import follow

EPOCHS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A run that logged to CSV and to W&B, without a callback, and a sidecar's folder for each."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    loggers = [CSVLogger(folder / "logs"), wandb_logger(folder / "online")]
    keep = ModelCheckpoint(folder / "kept", monitor="val_loss", save_top_k=-1, filename="{epoch}")
    L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=loggers, callbacks=[keep],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    ).fit(trained.Net(width=4), datamodule=trained.Data())  # fmt: skip
    finished(loggers[1], folder / "online")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "nice", lambda _: 0)  # the rest of this process is as urgent as before
        for out, run in (("csv", loggers[0].log_dir), ("wandb", str(folder / "online"))):
            arguments = ["measure", str(folder / "kept"), "--follow", "--run", str(run), "--module",
                         "support.trained:Net", "--data", "support.trained:Data", "--interval",
                         "0.05", "--idle", "0.3", "--num-eigenvalues", "3", "--out",
                         str(folder / out)]  # fmt: skip
            assert main(arguments) == 0
    return folder


def measured(folder: Path) -> dict[int, dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return {int(row["logged_step"]): row for row in rows}


def test_a_run_and_its_sidecar_are_one_run_with_both_in_its_rows(place):
    for run, out in (("logs", "csv"), ("online", "wandb")):
        (alone,) = load_runs(place / run, cache=False).runs
        table = load_runs([place / run, place / out], cache=False)
        (both,) = table.runs
        assert both.run_id == alone.run_id
        assert "one run" in table.copies[0]
        rows = measured(place / out)
        seen = np.isfinite(both.series("hessian/trace"))
        assert both.steps[seen].tolist() == sorted(rows) == [2, 5, 8, 11]
        np.testing.assert_array_equal(
            both.series("hessian/trace")[seen], [rows[s]["hessian/trace"] for s in sorted(rows)]
        )
        # In the very rows in which the run logged its validation.
        np.testing.assert_array_equal(both.series("val_loss"), alone.series("val_loss"))
        assert np.isfinite(both.series("val_loss")[seen]).all()
        gap = both.series("val_loss")[seen] - both.series("hessian/loss")[seen]
        np.testing.assert_array_equal(both.series("hessian/gap")[seen], gap)


def test_a_sidecar_of_another_run_stays_by_itself(place):
    table = load_runs([place / "logs", place / "wandb"], cache=False)
    assert len(table) == 2
    assert not table.copies


def test_a_table_that_was_kept_is_read_again_when_the_mark_changes(place, tmp_path):
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "metrics.csv").write_bytes((place / "csv" / "metrics.csv").read_bytes())
    both = [place / "logs", folder]
    assert len(load_runs(both, cache=tmp_path / "cache")) == 2
    (folder / "sidecar.json").write_bytes((place / "csv" / "sidecar.json").read_bytes())
    assert len(load_runs(both, cache=tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"folder": 3}', '{"run_id": ["a"]}', "1" * 70_000]
)
def test_a_mark_that_is_none_leaves_a_table_of_its_own(text, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,logged_step,hessian/trace\n3,2,1.5\n")
    (tmp_path / "sidecar.json").write_text(text)
    (run,) = load_runs(tmp_path, cache=False).runs
    assert run.series("hessian/trace").tolist() == [1.5]


def test_the_live_page_shows_what_was_measured_beside_the_run(place, tmp_path):
    page = follow(place / "online", tmp_path, monitor=["val_loss"], sidecar=place / "wandb")
    data = data_of(page.read_text())
    rows = measured(place / "wandb")
    assert data["measurements"] == EPOCHS
    assert data["latest"]["trace"] == pytest.approx(rows[11]["hessian/trace"])
    assert [spectrum["step"] for spectrum in data["spectra"]] == sorted(rows)
    assert {pair["statistic"] for pair in data["correlations"]} >= {"trace", "lambda_1"}
    assert all(pair["num_points"] == EPOCHS for pair in data["correlations"])


def test_the_live_page_of_a_sidecar_that_has_measured_nothing_or_another_run(place, tmp_path):
    run = read_offline_run(place / "online")
    beside, out = tmp_path / "beside", tmp_path / "page.html"
    beside.mkdir()
    how = {"monitor": ["val_loss"], "sidecar": beside, "once": True}
    with pytest.raises(ValueError, match="no folder of a sidecar"):
        follow(place / "online", out, **how)
    mark = {"run_id": run.run_id, "folder": "", "split": "train", "ended": False}
    (beside / "sidecar.json").write_text(json.dumps(mark))
    data = data_of(follow(place / "online", out, **how).read_text())
    assert (data["run"], data["measurements"]) == (run.run_id, 0)
    (beside / "sidecar.json").write_text(json.dumps({**mark, "run_id": "another"}))
    with pytest.raises(ValueError, match="beside another"):
        follow(place / "online", out, **how)


def test_the_page_ends_with_its_sidecar(place, tmp_path, capsys):
    page = tmp_path / "page.html"
    how = ["report", "--live", "--out", str(page)]
    assert main([*how, str(place / "online"), str(place / "wandb")]) == 0  # both have ended
    assert "page.html" in capsys.readouterr().out
    assert data_of(page.read_text())["measurements"] == EPOCHS
    assert main([*how, str(place / "online"), str(place / "nowhere")]) == 2
    assert "--live reads folders of runs on this machine" in capsys.readouterr().err


def test_the_page_of_a_csv_run_and_of_both_its_loggers_with_their_sidecars(place, tmp_path):
    page = tmp_path / "page.html"
    how = ["report", "--live", "--once", "--out", str(page)]
    assert main([*how, str(place / "logs"), str(place / "csv")]) == 0
    data = data_of(page.read_text())
    rows = measured(place / "csv")
    assert data["latest"]["trace"] == pytest.approx(rows[11]["hessian/trace"])
    assert [spectrum["step"] for spectrum in data["spectra"]] == sorted(rows)
    assert main([*how, *(str(place / name) for name in ("logs", "csv", "online", "wandb"))]) == 0
    both = data_of(page.read_text())  # one fit, whose two loggers each had a sidecar
    assert (both["measurements"], both["latest"]["trace"]) == (EPOCHS, data["latest"]["trace"])
    assert any("the same run as" in note for note in both["notes"])

"""A run without logger: its table, against Lightning's own CSVLogger, and a disk that is full."""

from __future__ import annotations

import csv
import logging
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import measuring_rank_only, train

from lightning_hessian import GradientStructureCallback, load_runs
from lightning_hessian.cli.main import main
from lightning_hessian.histories.csv_runs import read_csv
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.tracking.metrics_file import MetricsFile


def measuring_both() -> list[Any]:
    gradients = GradientStructureCallback(
        monitor="val_loss", num_batches=2, figures=100, on_error="raise", time_budget=None,
        num_gradients=20, num_eigenvalues=4,
    )  # fmt: skip
    correlated = measuring_rank_only(figures=100)
    correlated.correlated = ("lambda_1", "d_ks")
    return [correlated, gradients]


def test_it_holds_what_lightnings_own_logger_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    with caplog.at_level(logging.INFO):
        train(tmp_path, measuring_both(), False)
    folder = tmp_path / "hessian_logs" / "version_0"
    said = [record.message for record in caplog.records if str(folder) in record.message]
    assert len(said) == 1, "it is told once where the table is"
    assert "Without a logger" in said[0]
    logger = CSVLogger(tmp_path / "csv")
    train(tmp_path / "csv", measuring_both(), logger)
    (own,), (theirs,) = (load_runs(place, cache=False).runs for place in (folder, logger.log_dir))
    assert not own.problems
    measured = ~np.isnan(theirs.series("hessian/lambda_1"))
    assert measured.sum() == 6
    assert own.steps.tolist() == theirs.steps[measured].tolist()
    keys = {key for key in theirs.columns if not key.endswith(("seconds", "_step"))}
    assert keys - own.columns.keys() <= {"train_loss"}
    assert {"val_loss", "epoch", "correlation/pearson_lambda_1_val_loss"} <= own.columns.keys()
    for key in keys & own.columns.keys():  # self.log casts to float32
        expected = theirs.series(key)[measured]
        np.testing.assert_allclose(own.series(key), expected, rtol=1e-6, err_msg=key)
    assert [step for step, _ in read_spectra(folder)["hessian"]] == own.steps.tolist()


def test_report_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, [measuring_rank_only()], False)
    folder = tmp_path / "hessian_logs" / "version_0"
    assert main(["report", str(folder), "--out", str(tmp_path / "report"), "--no-cache"]) == 0
    assert "hessian/lambda_1 with val_loss" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.html").exists()


def test_nothing_is_written_where_figures_are_off(tmp_path: Path) -> None:
    train(tmp_path, [measuring_rank_only(figures=None)], False, epochs=1)
    assert not (tmp_path / "hessian_logs").exists()


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "hessian_logs").write_text("no folder")
    callback = measuring_rank_only(on_error="raise")
    with pytest.warns(UserWarning, match=r"Training goes on, but writing metrics\.csv failed"):
        train(tmp_path, [callback], False)
    assert len(callback.history) == 6


# The file by itself ---------------------------------------------------------------------------


def rows_of(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as opened:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(opened)]


def test_rows_of_one_step_are_one_and_columns_grow(tmp_path: Path) -> None:
    table = MetricsFile(tmp_path / "new")
    table.add(1, {"a": 0.1})
    table.add(1, {"val, loss": 1 / 3})
    table.add(4, {"a": float("nan")})
    table.add(9, {"b": -1e-300})
    table.add(9, {"a": 2.0})
    rows = rows_of(table.path)
    assert rows[0] == {"step": 1.0, "a": 0.1, "val, loss": 1 / 3}
    assert np.isnan(rows[1]["a"])
    assert rows[2] == {"step": 9.0, "a": 2.0, "b": -1e-300}
    assert len(rows) == 3
    found, problems = read_csv(table.path)
    assert problems == ()
    assert found[0] == rows[0]
    assert [path.name for path in table.path.parent.iterdir()] == ["metrics.csv"]


def test_a_full_disk_loses_no_row_before(tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the disk: the system refuses the same write."""
    table = MetricsFile(tmp_path)
    for step in range(5):
        table.add(step, {"a": step / 7})
    whole = rows_of(table.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (table.path.stat().st_size + 3, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            table.add(5, {"a": 5 / 7})
        torn = read_csv(table.path)[0]
        with pytest.raises(OSError, match="too large"):
            table.add(5, {"b": 1.0})
        with pytest.raises(OSError, match="too large"):
            table.add(6, {"c": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torn == whole
    table.add(6, {"a": 6 / 7})  # there is room again
    assert rows_of(table.path) == [*whole, {"step": 6.0, "a": 6 / 7, "c": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]

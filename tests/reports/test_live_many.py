"""The live page over the loggers people use, and over several runs side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.browser import CHROMIUM, drawn
from support.pages import data_of
from support.report_runs import logged, recording, write_csv_run
from support.runs import measuring_rank_only, train

from lightning_hessian.histories.transaction_log import EmptyRunError
from lightning_hessian.reports.live import follow
from lightning_hessian.tracking.loggers import adapter
from lightning_hessian.tracking.metrics_file import MetricsFile
from lightning_hessian.tracking.spectra import encode_spectrum

HOURS_AGO = time.time() - 10_000


def spectrum(seed: int) -> list[float]:
    return [float(f"{10 * 2.0**seed * (k + 1) ** -1.3:.4g}") for k in range(12)]


def write_with(logger: Any, seed: int) -> None:
    """Rows through a logger of Lightning, and a spectrum as the callback hands it over."""
    rows = logged(seed)
    for row in rows:
        step = int(row["trainer/global_step"])
        logger.log_metrics({k: v for k, v in row.items() if k != "trainer/global_step"}, step)
    take = adapter(logger).text
    if take is not None:
        take(logger, "spectra/hessian", encode_spectrum(spectrum(seed)), step)
    logger.save()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger, None])
def test_a_run_of_another_logger_has_the_page_of_its_numbers(kind: Any, tmp_path: Path) -> None:
    callback = measuring_rank_only(figures=100)
    logger = False if kind is None else kind(tmp_path)
    train(tmp_path, [callback], logger)
    folder = tmp_path / "hessian_logs" if kind is None else Path(logger.log_dir)
    if kind is TensorBoardLogger:
        logger.experiment.flush()
    page = follow(folder, tmp_path / "page.html", monitor=["val_loss"], once=True)
    data = data_of(page.read_text())
    assert data["kind"] == ("tensorboard" if kind is TensorBoardLogger else "csv")
    assert data["measurements"] == len(callback.history) == 6
    charts = {c["title"]: c for part in data["sections"] for c in part["charts"]}
    (line,) = charts["Largest eigenvalue"]["series"]
    expected = [[row["step"], row["lambda_1"]] for row in callback.history]
    np.testing.assert_allclose(line["points"], expected, rtol=1e-6)
    assert [found["step"] for found in data["spectra"]] == [row["step"] for row in callback.history]
    np.testing.assert_allclose(
        data["spectra"][-1]["values"], callback.last_spectrum.leading, rtol=1e-3
    )
    assert [figure["name"] for figure in data["figures"]] == ["hessian rank"]
    assert data["figures"][0]["data"].startswith("data:image/png;base64,iVBORw0KGgo")
    assert data["notes"] == []


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs of four kinds, each with a spectrum, and nothing changed for hours."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed in range(4):
        run = write_csv_run(folder / f"csv_{seed}", logged(seed), {"lr": 0.1})
        adapter_text(run, seed)
    for seed in (4, 5):
        logger = TensorBoardLogger(folder, name=f"tb_{seed}")
        write_with(logger, seed)
        logger.finalize("success")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with recording(folder, project="sweep", name="by wandb") as run:
            for row in logged(6):
                run.log(row)
            last = {"trainer/global_step": 300, "spectra/hessian": encode_spectrum(spectrum(6))}
            run.log(last)
    table = MetricsFile(folder / "hessian_logs" / "version_0")
    for row in logged(7):
        table.add(int(row.pop("trainer/global_step")), row)
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (HOURS_AGO, HOURS_AGO))
    return folder


def adapter_text(folder: Path, seed: int) -> None:
    line = {"step": 300, "spectra/hessian": encode_spectrum(spectrum(seed))}
    (folder / "spectra_hessian.jsonl").write_text(json.dumps(line) + "\n")


def test_eight_runs_stand_side_by_side(sweep: Path, tmp_path: Path) -> None:
    page = follow(sweep, tmp_path / "page.html", monitor=["val_loss", "gap"])
    data = data_of(page.read_text())
    assert data["refresh"] is None, "all have ended"
    names = [run["name"] for run in data["runs"]]
    assert names == [*(f"csv_{k}/version_0" for k in range(4)), "hessian_logs/version_0",
                     "tb_4/version_0", "tb_5/version_0", "by wandb"]  # fmt: skip
    seeds = [0, 1, 2, 3, 7, 4, 5, 6]
    charts = {c["title"]: c for part in data["sections"] for c in part["charts"]}
    for place, seed in enumerate(seeds):
        rows = logged(seed)
        for key, title in (("hessian/lambda_1", "Largest eigenvalue"), ("val_loss", "val_loss")):
            (line,) = [s for s in charts[title]["series"] if s["run"] == place]
            expected = [[row["trainer/global_step"], row[key]] for row in rows]
            np.testing.assert_allclose(line["points"], expected, rtol=1e-6)
        last = dict(zip(data["columns"], data["runs"][place]["values"], strict=True))
        assert last["d_ks"] == pytest.approx(rows[-1]["hessian/d_ks"], rel=1e-6)
        (point,) = [s for s in charts["val_loss over d_ks, across runs"]["series"]
                    if s["run"] == place]  # fmt: skip
        assert point["points"][0] == pytest.approx(
            [rows[-1]["hessian/d_ks"], rows[-1]["val_loss"]], rel=1e-6
        )
    shown = {found["run"]: found["points"] for found in data["spectra"]}
    assert list(shown) == [0, 1, 2, 3, 5, 6, 7], "the run without logger left no spectrum"
    for place, points in shown.items():
        assert [value for _, value in points] == pytest.approx(spectrum(seeds[place]), rel=1e-3)
    assert data["notes"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_a_browser_draws_each_run_in_its_colour(
    sweep: Path, width: int, dark: bool, tmp_path: Path
) -> None:
    page = follow(sweep, tmp_path / "page.html", monitor=["val_loss"], once=True)
    seen = drawn(page, width, dark, tmp_path)
    assert seen["svgs"] >= 8
    assert len(set(seen["swatches"])) == 8
    assert set(seen["strokes"]) == set(seen["swatches"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_run_that_was_switched_off_stays_off(sweep: Path, tmp_path: Path) -> None:
    page = follow(sweep, tmp_path / "page.html", monitor=["val_loss"], once=True)
    run = data_of(page.read_text())["runs"][2]["id"]
    off = f"sessionStorage.setItem('hidden', JSON.stringify([{json.dumps(run)}]));"
    seen = drawn(page, 1280, False, tmp_path, off)
    assert set(seen["swatches"]) - set(seen["strokes"]) == {seen["swatches"][2]}


def test_runs_that_go_on_come_or_are_damaged(tmp_path: Path) -> None:
    runs, page = tmp_path / "runs", tmp_path / "page.html"
    first = write_csv_run(runs / "a", logged(1), {})
    (runs / "b").mkdir()
    (runs / "b" / "metrics.csv").touch()  # it has just begun
    how: dict[str, Any] = {"monitor": ["val_loss"], "once": True}
    data = data_of(follow(runs, page, **how).read_text())
    assert data["run"] == str(first)
    assert data["status"].startswith("written to at")
    write_csv_run(runs / "c", logged(2), {})
    (runs / "d").mkdir()
    (runs / "d" / "metrics.csv").write_text("val_loss\n" + "x" * 10)
    data = data_of(follow(runs, page, **how).read_text())
    assert [run["name"] for run in data["runs"]][:2] == ["a/version_0", "c/version_0"]
    with pytest.raises(EmptyRunError):
        follow(runs / "b", page, **how)
    both = data_of(follow([runs / "a", runs / "c"], page, **how).read_text())
    assert [run["name"] for run in both["runs"]] == ["a/version_0", "c/version_0"]


def test_a_run_that_two_loggers_wrote_is_there_once(tmp_path: Path) -> None:
    callback = measuring_rank_only(figures=100)
    train(tmp_path, [callback], [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")])
    page = follow(tmp_path, tmp_path / "page.html", monitor=["val_loss"], once=True)
    data = data_of(page.read_text())
    assert data["measurements"] == 6
    assert len(data["notes"]) == 1


def test_a_name_is_text_and_a_picture_is_a_png(tmp_path: Path) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    logger = TensorBoardLogger(tmp_path / "x", name="tb")
    write_with(logger, 1)
    forged = Summary.Image(encoded_image_string=b"<svg onload='alert(1)'>")
    value = Summary.Value(tag="figures/hessian_rank", image=forged)
    logger.experiment._get_file_writer().add_summary(Summary(value=[value]), 1)
    logger.finalize("success")
    page = follow(tmp_path, tmp_path / "page.html", monitor=["val_loss"], once=True).read_text()
    assert data_of(page)["figures"] == []
    assert data_of(page)["notes"] == ["the figure 'hessian_rank' is left out: it is no PNG"]
    write_csv_run(tmp_path / "<script>alert(1)<_script>", logged(2), {})
    page = follow(tmp_path, tmp_path / "page.html", monitor=["val_loss"], once=True).read_text()
    assert page.count("<script>") == 1
    assert len(data_of(page)["runs"]) == 2


def test_event_files_without_tensorboard_say_what_to_install(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="tb")
    write_with(logger, 1)
    logger.finalize("success")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from lightning_hessian.cli.main import main
sys.exit(main(["report", "--live", "--once", {str(tmp_path)!r}, "--out", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "pip install 'lightning-hessian[tensorboard]'" in done.stderr
    assert "Traceback" not in done.stderr

"""What a report takes by itself: sizes, groups and monitors that the callbacks logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from scipy import stats

from lightning_hessian import correlation_report, load_runs
from lightning_hessian.cli.main import main
from lightning_hessian.results import ArgumentError

SIZES = [10, 100, 1000, 10_000, 100_000, 10**6]


def log_runs(folder: Path, **hyperparameters: list[Any]) -> Path:
    """Log six runs of three rows each, whose trace grows with the square root of the size."""
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        logger = CSVLogger(folder, name=f"run{number}", version="")
        ours = {name: values[number] for name, values in hyperparameters.items()}
        logger.log_hyperparams({"hessian_callback": ours})
        for step in range(3):
            row = {
                "val_loss": rng.random(), "val_error": rng.random(),
                "hessian/trace": size**0.5, "hessian/d_ks": rng.random(),
            }  # fmt: skip
            logger.log_metrics(row, step=step)
        logger.save()
    return folder


def test_sizes_groups_and_monitors_are_found(tmp_path: Path) -> None:
    optimizers = ["SGD", "Adam"] * 3
    folder = log_runs(
        tmp_path, num_parameters=SIZES, optimizer=optimizers, monitor=["val_error, gap"] * 6
    )
    report = correlation_report(load_runs(folder, cache=False))
    assert report.monitors == ("val_error",)
    assert report.settings["size"] == "hessian_callback.num_parameters"
    assert report.settings["group"] == "hessian_callback.optimizer"
    assert report.points is not None
    assert sorted(report.points.groups) == sorted(optimizers)
    (trace,) = [found for found in report.scaling if found.quantity == "hessian/trace"]
    expected = stats.linregress(np.log(SIZES), np.log(np.sqrt(SIZES))).slope
    assert trace.fit.exponent == pytest.approx(expected)


def test_what_is_named_goes_before(tmp_path: Path) -> None:
    folder = log_runs(tmp_path, num_parameters=SIZES, optimizer=list("aabbcc"), seed=list("xyxyxy"))
    table = load_runs(folder, cache=False)
    report = correlation_report(table, monitor="val_loss", group="seed", size=None)
    assert report.monitors == ("val_loss",)
    assert report.settings["group"] == "hessian_callback.seed"  # by its short name
    assert report.scaling == ()
    with pytest.raises(ArgumentError, match=r"hessian_callback\.num_parameters"):
        correlation_report(table, size="number_of_parameters")


@pytest.mark.parametrize(
    ("sizes", "optimizers"),
    [([10] * 6, ["SGD"] * 6), ([10, 20] * 3, list("abcdef")), ([], [])],
    ids=["all alike", "too few sizes, a group each", "not logged"],
)
def test_what_tells_nothing_is_left_out(
    tmp_path: Path, sizes: list[int], optimizers: list[str]
) -> None:
    logged = {"num_parameters": sizes, "optimizer": optimizers} if sizes else {}
    report = correlation_report(load_runs(log_runs(tmp_path, **logged), cache=False))
    assert (report.settings["size"], report.settings["group"]) == (None, None)
    assert report.scaling == ()
    assert report.monitors == ("val_loss",)


def test_the_command_finds_them(tmp_path: Path) -> None:
    folder = log_runs(tmp_path / "runs", num_parameters=SIZES, optimizer=["SGD", "Adam"] * 3)
    out = tmp_path / "out"
    assert main(["report", str(folder), "--out", str(out), "--no-cache", "--workers", "1"]) == 0
    text = (out / "report.md").read_text()
    assert "## Scaling with num\\_parameters" in text
    assert "| run | rows | step used | num\\_parameters | optimizer | source |" in text
    none = ["--size", "none", "--group", "none"]
    command = ["report", str(folder), *none, "--out", str(out), "--no-cache", "--workers", "1"]
    assert main(command) == 0
    assert "## Scaling" not in (out / "report.md").read_text()

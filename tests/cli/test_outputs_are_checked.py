"""Where a command writes to is proven before anything is read, measured or trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_hessian.cli.main import main
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.output import check_file, check_folder

CSV = "step,val_loss,hessian/d_ks\n" + "".join(f"{k},{1 / k},0.{k}\n" for k in range(1, 9))

BAD: dict[str, Callable[[Path], Path]] = {
    "a file": lambda folder: _file(folder / "file"),
    "below a file": lambda folder: _file(folder / "file") / "below" / "it",
    "below a device": lambda folder: Path("/dev/null/x"),
    "not of a real file system": lambda folder: Path("/proc/nothing/x"),
    "a name too long": lambda folder: folder / ("n" * 300),
    "a link to nothing": lambda folder: _link(folder / "link"),
}


def _file(path: Path) -> Path:
    path.write_text("kept")
    return path


def _link(path: Path) -> Path:
    path.symlink_to("/dev/null/x")
    return path


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("where", BAD)
@pytest.mark.parametrize("command", ["report", "live", "measure", "demo", "workspace"])
def test_a_place_that_cannot_be_written_to_is_found_first(
    command, where, tmp_path, capsys, monkeypatch
):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "metrics.csv").write_text(CSV)
    (runs / "a.ckpt").write_text("no checkpoint")
    bad = str(BAD[where](tmp_path))
    importlib.import_module("lightning_hessian.reports.report")  # it must not take in what follows
    for work in ("histories.load.load_runs", "reports.live.follow", "cli.digits.run_demo",
                 "tracking.dashboard.build_workspace",
                 "cli.checkpoint_spectra.read_checkpoint"):  # fmt: skip
        monkeypatch.setattr(f"lightning_hessian.{work}", forbidden)
    arguments = {
        "report": ["report", str(runs), "--out", bad],
        "live": ["report", str(runs), "--live", "--once", "--out", bad],
        "measure": ["measure", str(runs), "--module", "support.trained:Net", "--out", bad],
        "demo": ["demo", "--out", bad],
        "workspace": ["workspace", "a/b", "--spec", f"{bad}/view.json"],
    }[command]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert ("--spec" if command == "workspace" else "--out") in said
    assert "can be written" in said or "longer than" in said
    assert len(said.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_where_a_file_should_be(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text(CSV)
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "report.html is a folder" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="is a folder"):
        check_file(tmp_path / "out", "--spec")


def test_what_can_be_written_to_is_left_as_it_was(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b" / "c"):
        check_folder(folder, files=["x.csv"])
    check_file(tmp_path / "d" / "e.json", "--spec")
    assert list(tmp_path.iterdir()) == []


def test_a_report_from_python_is_checked_before_it_is_drawn(tmp_path, monkeypatch):
    from lightning_hessian import correlation_report, write_report

    (tmp_path / "metrics.csv").write_text(CSV)
    report = correlation_report(tmp_path)
    monkeypatch.setattr("lightning_hessian.reports.report.compose", forbidden)
    with pytest.raises(ArgumentError, match="can be written to"):
        write_report(report, "/dev/null/x")

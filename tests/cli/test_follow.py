"""`measure --follow`: a sidecar beside a fit, each in a process of its own; and how they join."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sidecar_job import NUM_EIGENVALUES, TOL
from support.wandb_server import LoggingServer

from lightning_hessian.histories.load import load_runs
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.results import load_spectrum

TESTS = Path(__file__).parents[1]
EPOCHS = 4
SETTINGS = ["--module", "support.trained:Net", "--data", "support.trained:Data", "--interval",
            "0.2", "--num-eigenvalues", str(NUM_EIGENVALUES), "--tol", str(TOL)]  # fmt: skip


def started(*arguments: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    environment |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    environment |= more
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], env=environment, stdout=file, stderr=file
        )


def waited(what: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: Any) -> Any:
    """A fit with a callback, and a sidecar that was killed once; both have ended."""
    place = tmp_path_factory.mktemp("beside")
    logs, out, told = place / "logs", place / "out", place / "sidecar.log"
    fit = started("support.sidecar_job", str(logs), str(EPOCHS), "1.5", log=place / "fit.log")
    processes = [fit]
    try:
        run = waited(lambda: next(logs.glob("wandb/offline-run-*"), None))
        run_id = run.name.rpartition("-")[2]
        follow = ["lightning_hessian.cli.main", "measure",
                  str(logs / "test" / run_id / "checkpoints"), "--follow", "--wandb", *SETTINGS,
                  "--out", str(out)]  # fmt: skip
        processes.append(started(*follow, log=told))
        waited(lambda: list(out.glob("spectra/*.npz")))
        processes[-1].send_signal(signal.SIGKILL)  # not even asked
        assert processes[-1].wait(60) == -signal.SIGKILL
        processes.append(started(*follow, log=told))
        assert fit.wait(120) == 0, (place / "fit.log").read_text()
        assert processes[-1].wait(120) == 0, told.read_text()
    finally:
        for process in processes:
            process.kill()
    return run, out, told.read_text()


def test_a_sidecar_measures_what_the_callback_measures(beside):
    run, out, told = beside
    read = {int(r["trainer/global_step"]): r for r in read_offline_run(run).rows
            if "hessian/lambda_1" in r}  # fmt: skip
    assert len(read) == EPOCHS
    rows = rows_of(out)
    assert sorted(int(row["logged_step"]) for row in rows) == sorted(read)
    for row in rows:
        mine = load_spectrum(out / "spectra" / f"epoch={row['epoch']}.npz")
        theirs = load_spectrum(run.parents[1] / "expected" / f"{row['logged_step']}.npz")
        bound = mine.residuals + theirs.residuals
        assert (abs(mine.eigenvalues - theirs.eigenvalues) <= bound).all()
        logged = read[int(row["logged_step"])]
        assert float(row["hessian/loss"]) == pytest.approx(logged["hessian/loss"], rel=1e-6)
        both = [float(row["hessian/trace_std_error"]), logged["hessian/trace_std_error"]]
        distance = float(row["hessian/trace"]) - logged["hessian/trace"]  # by other probes
        assert abs(distance) <= 4 * np.hypot(*both)
    assert "measured before" in told
    assert "the run has ended: its W&B run has ended with exit code 0" in told


def test_a_sidecar_writes_nothing_into_the_folders_of_the_run(beside):
    run, out, _ = beside
    checkpoints = next(run.parents[1].glob("test/*/checkpoints"))
    names = {f"epoch={epoch}.ckpt" for epoch in range(EPOCHS)} | {"last.ckpt"}
    assert {path.name for path in checkpoints.iterdir()} == names
    assert not [path for path in run.rglob("*") if "hessian" in path.name or "sidecar" in path.name]
    assert not list((out / "following").iterdir())


def test_its_run_at_wandb_is_of_the_same_group_and_over_the_same_steps(beside):
    run, out, _ = beside
    first = read_offline_run(run)
    # It was killed once: the second part of the run has the rows of the first, too.
    mine = read_offline_run(sorted(out.glob("wandb/offline-run-*"))[-1])
    assert mine.group == first.group == "pairs"
    assert mine.project == first.project
    assert mine.config["sidecar"]["run"] == first.run_id
    steps = {row["trainer/global_step"] for row in mine.rows if "hessian/trace" in row}
    assert steps == {row["trainer/global_step"] for row in first.rows if "hessian/trace" in row}
    assert mine.summary["hessian/trace"] == pytest.approx(float(rows_of(out)[-1]["hessian/trace"]))


def test_both_are_one_run_in_a_report_whatever_the_sidecar_wrote(beside):
    run, out, _ = beside
    table = load_runs([run, out], cache=False)
    assert [record.run_id for record in table.runs] == [read_offline_run(run).run_id]
    assert len(table.copies) == 2  # its folder, and its own run at W&B
    assert all("one run" in text for text in table.copies)
    (alone,) = load_runs(out / "metrics.csv", cache=False).runs  # without the run it is a run
    np.testing.assert_array_equal(alone.steps, [int(row["logged_step"]) for row in rows_of(out)])


def beside_a_server(place: Path, checkpoints: Path, **server: str) -> tuple[str, Path]:
    """Runs a sidecar that logs into ada/digits/abc; returns what it said, and its folder."""
    told, out = place / "log", place / "out"
    process = started(
        "lightning_hessian.cli.main", "measure", str(checkpoints), "--follow", *SETTINGS, "--idle",
        "0.5", "--run", "ada/digits/abc", "--wandb", "--wandb-shared", "--out", str(out), log=told,
        HOME=str(place), WANDB_MODE="online", **server,
    )  # fmt: skip
    try:
        assert process.wait(120) == 0, told.read_text()
    finally:
        process.kill()
    assert len(rows_of(out)) == EPOCHS
    return told.read_text(), out


def test_a_server_that_knows_nobody_keeps_nothing_from_being_measured(beside, tmp_path):
    checkpoints = next(beside[0].parents[1].glob("test/*/checkpoints"))
    server = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    told, out = beside_a_server(tmp_path, checkpoints, **server)
    assert "--wandb: no more is logged to W&B (UsageError" in told
    mark = json.loads((out / "sidecar.json").read_text())
    assert (mark["run_id"], mark["ended"]) == ("abc", True)


def test_in_shared_mode_the_rows_are_rows_of_the_run_itself(beside, tmp_path):
    checkpoints = next(beside[0].parents[1].glob("test/*/checkpoints"))
    with LoggingServer() as server:
        access = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server.url}
        _, out = beside_a_server(tmp_path, checkpoints, **access)
    assert set(server.rows) == {"abc"}
    sent = {
        row["trainer/global_step"]: row for row in server.rows["abc"] if "spectra/hessian" in row
    }
    measured = {int(row["logged_step"]): row for row in rows_of(out)}
    assert sent.keys() == measured.keys()
    for step, row in sent.items():
        assert row["hessian/trace"] == pytest.approx(float(measured[step]["hessian/trace"]))
    # The run goes on: nobody is told that it has ended, nor what it is called.
    assert not any(stream.get("complete") for stream in server.streams)
    assert not any(upsert.get("groupName") or upsert.get("state") for upsert in server.upserts)

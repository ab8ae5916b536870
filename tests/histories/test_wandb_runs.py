"""The real W&B client against a server on this machine: queries, errors, and a saved report."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.graphql_server import GraphQLServer
from support.report_runs import logged

from lightning_hessian import correlation_report, load_runs
from lightning_hessian.histories import wandb_runs
from lightning_hessian.histories.wandb_runs import parse_wandb_path

KEYS = ("val_loss", "hessian/d_ks", "hessian/lambda_1")


def remote_run(seed: int, state: str = "finished", count: int = 30) -> dict:
    """A run as the server has it: rows of training between those of validation."""
    rows = []
    for row in logged(seed, count):
        rows.append({"_step": len(rows), "train_loss": 0.5, "trainer/global_step": 1})
        rows.append({"_step": len(rows), **row})
    config = {"optimizer": "adam" if seed % 2 else "sgd", "width": 2**seed}
    return {"name": f"run {seed}", "state": state, "config": config, "rows": rows}


@pytest.fixture
def server(own_wandb, monkeypatch):
    runs = {f"r{seed}": remote_run(seed) for seed in range(5)}
    runs["r4"]["state"] = "running"
    with GraphQLServer(runs) as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield found


def assert_holds(run, seed) -> None:
    rows = logged(seed)
    assert run.steps.tolist() == [1.0, *(row["trainer/global_step"] for row in rows)]
    for key in KEYS:
        assert run.series(key)[1:].tolist() == [row[key] for row in rows]


def test_all_runs_of_a_project(server):
    table = load_runs("ada/digits", cache=False)
    assert [run.name for run in table] == [f"run {seed}" for seed in range(5)]
    for seed, run in enumerate(table):
        assert_holds(run, seed)
        assert run.config == {"optimizer": "adam" if seed % 2 else "sgd", "width": 2**seed}
        assert (run.kind, run.source) == ("wandb", f"ada/digits/r{seed}")
    assert table.problems == ("run 4: the run is running: more rows may come",)
    assert len(server.asked("runs(")) == 3  # pages of two


def test_one_run_and_filters(server):
    (run,) = load_runs("ada/digits/r2", cache=False)
    assert_holds(run, 2)
    table = load_runs("ada/digits", filters={"config.optimizer": "adam"}, cache=False)
    assert [run.run_id for run in table] == ["r1", "r3"]
    with pytest.raises(ValueError, match="has no runs that pass the filters"):
        load_runs("ada/digits", filters={"config.optimizer": "lion"}, cache=False)


def test_values_that_json_lacks_and_repeated_steps(server):
    rows = server.runs["r0"]["rows"]
    rows[3]["val_loss"] = "NaN"
    rows.append({**rows[5], "_step": 60, "val_loss": 77.0})  # after a resume
    (run,) = load_runs("ada/digits/r0", cache=False)
    assert run.series("val_loss")[2:4].tolist() == pytest.approx([float("nan"), 77.0], nan_ok=True)


def test_ended_runs_are_kept_and_live_ones_read_again(server, tmp_path):
    load_runs("ada/digits", cache=tmp_path)
    server.queries.clear()
    again = load_runs("ada/digits", cache=tmp_path)
    for seed, run in enumerate(again):
        assert_holds(run, seed)
    assert {v["run"] for v in server.asked("history(")} == {"r4"}
    server.runs["r0"]["rows"].append({"_step": 60, "trainer/global_step": 999, "val_loss": 0.0})
    assert len(load_runs("ada/digits/r0", cache=tmp_path).runs[0]) == 32


def test_a_long_run_is_read_column_by_column(server, monkeypatch):
    monkeypatch.setattr(wandb_runs, "_STEPS_AT_ONCE", 20)
    for row in server.runs["r1"]["rows"][1::4]:
        del row["hessian/lambda_1"]  # a scan with all keys would lose these rows
    (run,) = load_runs("ada/digits/r1", cache=False)
    rows = logged(1)
    assert run.steps.tolist()[1:] == [row["trainer/global_step"] for row in rows]
    assert run.series("hessian/d_ks")[1:].tolist() == [row["hessian/d_ks"] for row in rows]
    assert run.series("val_loss")[1:].tolist() == [row["val_loss"] for row in rows]
    assert "only" in run.problems[0]
    (run,) = load_runs("ada/digits/r1", cache=False, keys=["*step"])
    assert "60 rows" in run.problems[0]


def test_what_does_not_exist(server):
    with pytest.raises(ValueError, match="no such W&B run or project"):
        load_runs("ada/digits/unknown", cache=False)
    with pytest.raises(ValueError, match="no such W&B run or project"):
        load_runs("ada/nothing", cache=False)


def test_a_report_is_saved_beside_the_runs(server, capsys):
    pytest.importorskip("wandb_workspaces")
    from lightning_hessian.reports.publish import publish

    report = correlation_report(load_runs("ada/digits", cache=False), group="optimizer")
    url = publish(report, "ada/digits")
    assert url.startswith(f"{server.url}/ada/digits/reports/")
    (saved,) = server.reports
    assert (saved["entityName"], saved["projectName"]) == ("ada", "digits")
    assert saved["displayName"] == "Which statistic goes with val_loss?"
    spec = json.loads(saved["spec"])
    (words,) = [b["content"] for b in spec["blocks"] if b["type"] == "markdown-block"]
    assert "\n| `hessian/d_ks` | " in words
    (grid,) = [b for b in spec["blocks"] if b["type"] == "panel-grid"]
    panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
    drawn = {(p["config"]["xAxis"], p["config"]["yAxis"]) for p in panels}
    assert ("summary:hessian/d_ks", "summary:val_loss") in drawn
    with pytest.raises(ValueError, match="give ENTITY/PROJECT"):
        publish(report, "digits")


NO_ACCOUNT = """
import os, sys
from lightning_hessian.cli.main import main
os.environ["WANDB_BASE_URL"] = sys.argv[1]
sys.exit(main(["report", "ada/digits", "--out", sys.argv[2]]))
"""


def refused(url, tmp_path, **environment):
    """Runs the command in a process of its own, as W&B keeps what it was told once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    folders = dict.fromkeys(("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "HOME", "NETRC"), str(tmp_path))
    return subprocess.run(
        [sys.executable, "-c", NO_ACCOUNT, url, str(tmp_path / "out")],
        env=clean | folders | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_nobody_is_logged_in(server, tmp_path):
    done = refused(server.url, tmp_path)
    assert done.returncode == 2
    assert "Run `wandb login`" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # the client itself waits for half a minute
def test_no_network(tmp_path):
    done = refused("http://127.0.0.1:9", tmp_path, WANDB_API_KEY="0" * 40)
    assert done.returncode == 2
    assert "did not answer" in done.stderr
    assert "Check the network" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a/b", ("a/b", None, None)),
        ("a/b/c", ("a/b", "c", None)),
        ("a/b/runs/c", ("a/b", "c", None)),
        ("a/b/sweeps/s", ("a/b", None, "s")),
        ("https://wandb.ai/a/b/runs/c/overview?nw=1", ("a/b", "c", None)),
        ("https://my.host:8080/a/b", ("a/b", None, None)),
    ],
)
def test_what_a_path_means(text, meant):
    path = parse_wandb_path(text)
    assert (path.project, path.run_id, path.sweep_id) == meant


@pytest.mark.parametrize("text", ["a", "./a/b", "../a", "/tmp/x", "a b/c", "a/b/c/d/e"])
def test_what_no_path_is(text):
    assert parse_wandb_path(text) is None

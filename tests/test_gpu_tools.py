"""The tools for a card run on a machine without one, and say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tools", "benchmarks")]

import torch  # noqa: E402
from gpu.running import Check, Settings, SkippedError, outcome_of, run  # noqa: E402
from gpu.tables import markdown  # noqa: E402

HERE = Settings(torch.device("cpu"))


def tool(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool from another folder, with nothing installed but what it imports."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), "--device", "cpu", *options],
        capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT.parent,
    )  # fmt: skip


def raising(error: Exception) -> Check:
    def work(settings: Settings) -> str:
        raise error

    return Check("it raises", work)


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    def endless(settings: Settings) -> str:
        while True:
            pass

    checks = [
        Check("true", lambda settings: "as it should be"),
        raising(AssertionError("one and one are three")),
        raising(SkippedError("no card")),
        raising(ModuleNotFoundError("No module named 'wandb'", name="wandb")),
        raising(ModuleNotFoundError("No module", name="lightning_hessian.gone")),
        Check("endless", endless, seconds=0.2),
        Check("the last", lambda settings: ""),
    ]
    outcomes = run(checks, HERE, 60, tmp_path / "record.json")
    verdicts = ["passed", "failed", "skipped", "skipped", "failed", "failed", "passed"]
    assert [outcome.verdict for outcome in outcomes] == verdicts
    assert "one and one are three" in outcomes[1].message
    assert "wandb" in outcomes[3].message
    assert "TimeoutError" in outcomes[5].message
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["passed"], record["failed"], record["skipped"]) == (2, 3, 2)
    assert record["ran_on_a_card"] is False


def test_nothing_is_begun_when_time_is_up() -> None:
    outcome = outcome_of(Check("late", lambda settings: ""), HERE, 1.0)
    assert (outcome.verdict, outcome.message) == ("skipped", "no time was left")


def test_a_check_of_products_runs(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    done = tool("gpu_check.py", "--only", "products autograd, mlp", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not run on a card" in done.stdout
    assert [one["verdict"] for one in json.loads(file.read_text())["checks"]] == ["passed"]


def test_pieces_resume(tmp_path: Path) -> None:
    """A piece that is done is not measured again; one whose time was up is."""
    options = ("--small", "--only", "orthogonalisation", "--out", str(tmp_path))
    file = tmp_path / "orthogonalisation.json"
    file.write_text(json.dumps({"state": "unfinished", "small": True}))
    assert tool("gpu_bench.py", *options).returncode == 0
    first = json.loads(file.read_text())
    assert first["state"] == "done"
    assert set(first["found"]["rows"]) == {"10", "100"}
    assert tool("gpu_bench.py", *options).returncode == 0
    assert json.loads(file.read_text()) == first
    assert "Not run on a card" in (tmp_path / "table.md").read_text()


def test_ratios_of_the_table() -> None:
    found = {
        "network": "a network", "parameters": 1000,
        "gradient_seconds": {"eager": 0.5, "compiled": 0.25},
        "engines": {"autograd": {"build_seconds": 1.0, "seconds": 1.0, "seconds_each_of_4": 0.75},
                    "compile": {"failed": "no compiler"}},
    }  # fmt: skip
    settings = {"packages": {}, "python": "3", "cuda": "13", "card": "a card"}
    record = {
        "piece": "products-a", "state": "done", "small": False, "environment": settings,
        "found": found,
    }  # fmt: skip
    table = markdown([record])
    assert "| a network | 1,000 | autograd | 1.0 | 1e+03 | 2.00 | 4.00 |  |" in table
    assert "| a network | 1,000 | autograd, each of 4 |  | 750 | 1.50 | 3.00 |  |" in table
    assert "no compiler" in table
    assert "7.9, 4.9, 4.5" in table  # as published


@pytest.mark.slow
def test_all_checks_run_without_a_card(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    done = tool("gpu_check.py", "--json", str(file), "--budget", "800")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(file.read_text())["passed"] > 40


@pytest.mark.slow
def test_all_pieces_run_without_a_card(tmp_path: Path) -> None:
    done = tool("gpu_bench.py", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("products-nanogpt", "products-vit"):
        engines = json.loads((tmp_path / f"{name}.json").read_text())["found"]["engines"]
        assert all(engine["seconds"] > 0 for engine in engines.values())

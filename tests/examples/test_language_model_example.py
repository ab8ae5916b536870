"""`nano` on a text of its own: what is written, that it goes on where it was, and what is read."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.references import dense_hessian

EXAMPLE = Path(__file__).parents[2] / "examples" / "language_model"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    nano, evidence = (importlib.import_module(name) for name in ("nano", "evidence"))
    monkeypatch.setattr(nano, "STEPS", (0, 1, 2, 3))
    monkeypatch.setitem(nano.SIZES, "tiny", nano.Size(1, 2, 4, 6, 3, 5, 3, 12))
    return nano, evidence


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tinyshakespeare"
    place.mkdir()
    letters = np.random.default_rng(0).choice(list("abcde "), size=2000)
    (place / "input.txt").write_text("".join(letters))
    return tmp_path


def given(folder: Path, **changed: Any) -> Namespace:
    arguments = {"size": "tiny", "seed": 1, "data_dir": folder, "device": "cpu", "pooled": False}
    return Namespace(**{**arguments, **changed})


def test_a_run_that_was_stopped_ends_as_one_that_was_not(example: Any, folder: Path) -> None:
    nano, _ = example
    whole, stopped = folder / "whole.json", folder / "stopped.json"
    nano.run(given(folder), whole)
    rows = json.loads(whole.read_text())["rows"]
    stopped.write_text(json.dumps({"rows": rows[:2]}))
    nano.run(given(folder), stopped)
    for row, again in zip(rows, json.loads(stopped.read_text())["rows"], strict=True):
        assert again["test_loss"] == row["test_loss"]
        assert again["last"]["eigenvalues"] == row["last"]["eigenvalues"]


def test_the_last_layer_is_that_of_the_whole_network(example: Any, folder: Path) -> None:
    """Its inputs are computed once; the dense block of the whole network knows nothing of that."""
    nano, _ = example
    torch.manual_seed(0)
    size = nano.SIZES["tiny"]
    train, _ = nano.characters(folder)
    probe = nano.sequences(train, size.probe, size.context, 1)
    model = nano.GPT(size, int(train.max()) + 1)
    found = nano.measured(model, size, probe, pooled=False)
    block = dense_hessian(model, nano.loss_fn, probe, ["head.weight"])
    expected = np.sort(torch.linalg.eigvalsh(block.detach()).numpy())[::-1]
    values = found["last"]["eigenvalues"]
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-3, atol=1e-8)
    assert found["last"]["dtype"] == "float64"
    whole = torch.linalg.eigvalsh(dense_hessian(model, nano.loss_fn, probe).detach())
    assert found["all"]["eigenvalues"][0] == pytest.approx(float(whole[-1]), rel=1e-3)


def test_one_k_serves_all_measurements_of_a_run(example: Any) -> None:
    _, evidence = example
    rng = np.random.default_rng(0)
    rows = []
    for converged in (30, 20, 25, 30):
        values = np.sort(stats.pareto(1.0).rvs(30, random_state=rng))[::-1]
        part = {"eigenvalues": values.tolist(), "num_converged": converged, "trace": 1.0}
        rows.append({"step": len(rows), "test_loss": 1.0, "train_loss": 0.75, "last": part})
    held = evidence.series(rows, "last")
    assert set(held["k"]) == {20}
    assert set(held["gap"]) == {0.25}
    for row, slope, distance in zip(rows, held["s_hat"], held["d_ks"], strict=True):
        values = np.array(row["last"]["eigenvalues"][:20])
        logarithms = np.log(values / values[-1])
        assert slope == pytest.approx(logarithms.mean())
        expected = stats.ks_1samp(logarithms, stats.expon(scale=logarithms.mean()).cdf).statistic
        assert distance == pytest.approx(expected)


def test_what_is_printed_is_the_verdict_of_the_rule(
    example: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nano, evidence = example
    path = folder / "run.json"
    nano.run(given(folder), path)
    capsys.readouterr()
    evidence.print_findings([path])
    said = capsys.readouterr().out
    assert "tiny, seed 1, last: K = " in said
    assert "too few points to tell" in said
    assert "an interval takes 9 measurements that vary" in said

"""Gradient structure by several processes under Lightning's DDP, against one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.gradient_job import CASES, WORD, Noisy, fit, measured, watching
from support.job import Network, dataset
from support.launching import JOBS

from lightning_hessian.probe.minibatches import draw_minibatches

JOB = JOBS / "gradient_job.py"
FEWER = [
    "stored", "chosen", "mapped", "recomputed", "variants", "per sample, noisy", "few", "layer",
    "few parameters",
]  # fmt: skip
ASKED = {2: list(CASES), 4: FEWER}
PAIRS = [(world, case) for world, cases in ASKED.items() for case in cases]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each of two and of four ranks saw."""
    seen = {}
    for world, cases in ASKED.items():
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(JOB.parents[2])}
        job = {"devices": world, "cases": cases, "train": world == 2}
        done = subprocess.run(
            [sys.executable, str(JOB), str(folder), json.dumps(job)],
            capture_output=True, text=True, timeout=240, env=environment, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        seen[world] = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(world)]
    return seen


@pytest.mark.parametrize(("world", "case"), PAIRS, ids=lambda value: str(value))
def test_several_ranks_find_what_one_finds(ranks, world: int, case: str) -> None:
    """50 gradients over four ranks, 3 over four, 41 samples over two: uneven everywhere."""
    alone = _alone(case)
    found = ranks[world][0]["probe"][case]
    for key in ("covariance", "second_moment"):
        top = alone[key][0]
        np.testing.assert_allclose(found[key], alone[key], rtol=1e-6, atol=1e-13 * top)
    for key in ("covariance_trace", "second_moment_trace", "mean_gradient_norm", "loss"):
        assert found[key] == pytest.approx(alone[key], rel=1e-9), key
    for key in ("num_gradients", "num_parameters", "batch_size", "engine", "dtype"):
        assert found.get(key) == alone.get(key), key
    if case != "recomputed":  # smaller slices, larger blocks
        assert found["num_computed"] == alone["num_computed"]
    for key in ("dimension_tests", "iteration_tests"):
        assert (key in found) == (key in alone) == CASES[case].get("tests", True)
        if key in alone:
            np.testing.assert_allclose(found[key][0], alone[key][0], rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(found[key][1], alone[key][1], rtol=1e-6, atol=1e-12)
            assert found[key][2:] == alone[key][2:]
            typical = f"{key}_typical"
            np.testing.assert_allclose(found[typical], alone[typical], rtol=1e-6, atol=1e-12)
    if "eigenvectors" in alone:
        cosines = np.sum(np.multiply(found["eigenvectors"], alone["eigenvectors"]), axis=1)
        np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_get_the_same_numbers(ranks, world: int) -> None:
    """To the last bit."""
    for case in ASKED[world]:
        first, *others = (dict(seen["probe"][case]) for seen in ranks[world])
        for other in others:
            for key in ("bytes", "mapped", "fetched"):  # what each rank holds is its own
                other.pop(key, None)
                first.pop(key, None)
            assert json.dumps(other) == json.dumps(first)  # here NaN is NaN


@cache
def _alone(case: str) -> dict[str, Any]:
    return measured(case, Network())


def _loop() -> np.ndarray:
    """The gradients of the stored case by one backward pass after the other."""
    module, (inputs, targets) = Network().eval(), dataset().tensors
    rows = []
    for batch in draw_minibatches([(inputs, targets)], batch_size=3, num_minibatches=50):
        module.zero_grad()
        module.loss(batch).backward()
        rows.append(torch.cat([p.grad.flatten() for p in module.parameters()]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("world", [2, 4])
def test_against_the_explicit_covariance_and_scipy(ranks, world: int) -> None:
    gradients = _loop()
    expected = np.linalg.eigvalsh(np.cov(gradients.T))[::-1]
    found = ranks[world][0]["probe"]
    np.testing.assert_allclose(
        found["stored"]["covariance"], expected[:49], rtol=1e-6, atol=1e-13 * expected[0]
    )
    np.testing.assert_allclose(found["operator"], expected[:4], rtol=1e-6)
    distances, p_values, _, num_points, _ = found["stored"]["iteration_tests"]
    assert num_points == 50  # all of a row, in whatever order
    np.testing.assert_allclose(p_values, stats.normaltest(gradients).pvalue, rtol=1e-6)
    for column, distance in zip(gradients.T, distances, strict=True):
        top = np.sort(np.abs(column))
        fitted = stats.pareto(b=1 / np.log(top / top[0]).mean(), scale=top[0])
        assert distance == pytest.approx(stats.ks_1samp(top, fitted.cdf).statistic, abs=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_holds_its_slice_of_g(ranks, world: int) -> None:
    size = sum(p.numel() for p in Network().parameters())
    for case, bytes_each in (("stored", 8), ("mapped", 8)):
        held = [seen["probe"][case]["bytes"] for seen in ranks[world]]
        assert sum(held) == bytes_each * 50 * size
        assert max(held) <= bytes_each * 50 * -(-size // world)
    assert ranks[world][0]["probe"]["mapped"]["mapped"]
    assert not ranks[world][0]["probe"]["stored"]["mapped"]


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_fetches_its_own_samples_only(ranks, world: int) -> None:
    """41 of them; two more are looked at first."""
    assert isinstance(CASES["per sample, noisy"]["data"], Noisy)
    for seen in ranks[world]:
        assert seen["probe"]["per sample, noisy"]["fetched"] <= -(-41 // world) + 2


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exception", r"Rank LAST failed: RuntimeError: " + WORD),
        ("streamed", r"Rank LAST failed: RuntimeError: " + WORD),
        ("nan", "Rank 1 failed: The gradient of mini-batch 5 is NaN or infinite"),
        ("disk", "Rank 1 failed: ArgumentError: directory=.*There is no folder"),
        ("other data", "Rank 1 has other data .* other samples. Give all ranks the same"),
        ("no data", r"Rank 1.* failed: ArgumentError: data=\[\] cannot be used"),
        ("budget", "inner products of 50 gradients take"),
    ],
)
def test_a_failure_is_agreed_on(ranks, world: int, name: str, message: str) -> None:
    for seen in ranks[world]:
        kind, text, seconds = seen["probe"]["failures"][name]
        assert kind == "RankError"
        assert re.search(message.replace("LAST", str(world - 1)), text), text
        assert seconds < 20


@pytest.mark.parametrize("world", [2, 4])
def test_time_is_up_for_all(ranks, world: int) -> None:
    """One rank's clock says so after 24 gradients."""
    expected = np.cov(_loop()[:24].T)
    for rank, seen in enumerate(ranks[world]):
        for found in seen["probe"]["cut"]:
            assert found["num_gradients"] == 24
            assert found["covariance_trace"] == pytest.approx(np.trace(expected), rel=1e-9)
            told = [text for text in found["warnings"] if "after 24 of 50" in text]
            assert len(told) == (rank == 0)


def test_the_history_does_not_depend_on_the_number_of_ranks(ranks, tmp_path: Path) -> None:
    watch = watching()
    fit(tmp_path, 1, 0.0, [watch])
    for seen in [*ranks[2], *ranks[4]]:
        (row,) = seen["history"]  # the second measurement failed
        reference = watch.history[0]
        assert row.keys() == reference.keys()
        for key in row.keys() - {"step", "seconds", "val_loss"}:
            assert row[key] == pytest.approx(reference[key], rel=1e-6), key


@pytest.mark.parametrize("world", [2, 4])
def test_a_callback_that_fails_on_a_rank_lets_training_go_on(ranks, world: int) -> None:
    for rank, seen in enumerate(ranks[world]):
        told = [text for text in seen["warnings"] if "training goes on" in text]
        assert len(told) == (rank == 0)
        assert all("Rank 1 failed" in text and WORD in text for text in told)


def test_training_is_bit_identical(ranks) -> None:
    for seen in ranks[2]:
        assert seen["plain"]["weights"] == seen["watched"]["weights"]
        assert seen["plain"]["draw"] == seen["watched"]["draw"]

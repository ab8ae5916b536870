"""Measurements by several processes under Lightning's DDP, against one process."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.job import Network, batches, loss_fn, measured
from support.launching import run
from support.references import dense_hessian

from lightning_hessian.histories.offline_run import read_offline_run


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two and four ranks saw, measuring before and during a training at rate zero."""
    folder = tmp_path_factory.mktemp("ddp")
    common = {"strategy": "ddp", "probe": 6, "callback": {}, "learning_rate": 0.0}
    return {
        "folder": folder,
        1: run(folder / "1", callback={}, learning_rate=0.0, epochs=2),
        2: run(folder / "2", devices=2, **common, epochs=2),
        4: run(folder / "4", devices=4, **{**common, "probe": 3}),
    }


@pytest.mark.parametrize(("world", "count"), [(2, 6), (4, 3)])
def test_several_ranks_find_what_one_finds(jobs, world, count):
    """Six batches with a ragged last one over two ranks; three batches over four ranks."""
    alone = measured(Network(), count)
    for seen in jobs[world]:
        found = seen["probe"]
        assert found["num_converged"] == 8
        assert found["num_samples"] == alone["num_samples"]
        for key in ("eigenvalues", "frobenius", "trace", "trace_std_error", "loss", "ratio"):
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-5, err_msg=key)
        assert found["heterogeneity"] == pytest.approx(alone["heterogeneity"], rel=1e-3)
        # Orthogonality differs by rounding, so the number of steps may, by one check.
        assert found["num_hvps"] == pytest.approx(alone["num_hvps"], rel=0.1)


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_get_the_same_numbers(jobs, world):
    own = {"bytes_of_a_vector", "shift"}
    first, *others = (
        {k: v for k, v in seen["probe"].items() if k not in own} for seen in jobs[world]
    )
    assert all(other == first for other in others)


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_measure_with_the_first_ones_buffers_and_keep_their_own(jobs, world):
    """The numbers above are those of a shift of zero, which only rank zero has."""
    shifts = [seen["probe"]["shift"] for seen in jobs[world]]
    assert shifts == pytest.approx([0.1 * rank for rank in range(world)])


def test_the_eigenvalues_are_those_of_the_dense_hessian(jobs):
    module = Network().eval()
    dense = sum(dense_hessian(module, loss_fn, batch) * len(batch[0]) / 44 for batch in batches(6))
    expected = np.linalg.eigvalsh(dense)[::-1][:8]
    np.testing.assert_allclose(jobs[2][0]["probe"]["eigenvalues"], expected, rtol=1e-5)


@pytest.mark.parametrize(("world", "count"), [(2, 6), (4, 3)])
def test_a_rank_holds_its_share_of_the_basis(jobs, world, count):
    size = sum(p.numel() for p in Network().parameters())
    held = [seen["probe"]["bytes_of_a_vector"] for seen in jobs[world]]
    assert sum(held) == 8 * size
    assert max(held) <= 8 * -(-size // world)


@pytest.mark.parametrize("world", [2, 4])
def test_a_product_takes_two_collectives(jobs, world):
    """One gathers the vector, one scatters the sum, whatever the number of batches."""
    found = jobs[world][0]["probe"]
    calls = found["calls"]
    gathers = sum(n for name, n in calls.items() if "gather" in name)
    scatters = sum(n for name, n in calls.items() if "scatter" in name)
    assert gathers == scatters
    assert gathers >= found["num_hvps"]
    # Two sums orthogonalise; a few more are for probes and checks.
    assert calls["all_reduce"] <= 4 * gathers


def test_the_history_does_not_depend_on_the_number_of_ranks(jobs):
    """At rate zero the weights are the same everywhere."""
    alone = jobs[1][0]["history"]
    assert len(alone) == 2
    for world in (2, 4):
        for seen in jobs[world]:
            for row, reference in zip(seen["history"], alone, strict=False):
                assert row.keys() == reference.keys()
                for key in ("lambda_1", "trace", "d_ks", "s_hat", "val_loss"):
                    assert row[key] == pytest.approx(reference[key], rel=2e-5), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    """The same training on two ranks, without and with the callback."""
    folder = tmp_path_factory.mktemp("trained")
    common = {"strategy": "ddp", "devices": 2, "epochs": 5, "log": True}
    plain = run(folder / "plain", **common)
    return folder, plain, run(folder / "watched", **common, callback={})


def test_rank_zero_alone_writes(trained):
    """One W&B run and one CSV folder; correlations count every measurement once."""
    folder, _, seen = trained
    runs = list((folder / "watched" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    counts: list[float] = []
    for _ in range(60):  # W&B's own process may still be writing
        rows = read_offline_run(runs[0]).rows
        counts = [row["correlation/num_points"] for row in rows if "correlation/num_points" in row]
        if len(counts) == 2:
            break
        time.sleep(0.5)
    assert counts == [4, 5]
    with (folder / "watched" / "csv" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["hessian/lambda_1"]]
    expected = [row["lambda_1"] for row in seen[0]["history"]]
    assert len(expected) == 5
    np.testing.assert_allclose([float(row["hessian/lambda_1"]) for row in logged], expected, 1e-6)


def test_training_is_bit_identical(trained):
    folder, plain, watched = trained
    assert [seen["draw"] for seen in plain] == [seen["draw"] for seen in watched]
    before, after = (torch.load(folder / name / "weights.pt") for name in ("plain", "watched"))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_ranks_decide_alike_what_the_budget_pays_for(tmp_path):
    """Of a run that pays for some measurements, and of one that pays for the last alone."""
    for share in (0.5, 1e-6):
        seen = run(
            tmp_path / str(share), strategy="ddp", devices=2, epochs=6,
            callback={"time_budget": share, "blocks": None},
        )  # fmt: skip
        steps = [[row["step"] for row in each["history"]] for each in seen]
        assert steps[0] == steps[1]
        epochs = [row["epoch"] for row in seen[0]["history"]]
        assert epochs[-1] == 5
        assert len(epochs) == 1 or share == 0.5


def test_ranks_decide_alike_what_is_measured_between(tmp_path):
    """A few products at validations that are not measured whole; all ranks share them."""
    seen = run(
        tmp_path, strategy="ddp", devices=2, epochs=5, slow=True,
        callback={
            "time_budget": 0.3, "blocks": None, "hvp": "recompute", "num_eigenvalues": 60,
            "num_batches": 2,
        },
    )  # fmt: skip
    assert seen[0]["lengths"] == seen[1]["lengths"]
    assert len(seen[0]["lengths"]) > len(seen[0]["history"]) >= 1
    assert [row["epoch"] for row in seen[1]["history"]][-1] == 4
    assert (tmp_path / "weights.pt").exists()


def test_a_rank_that_fails_takes_none_along(tmp_path):
    """It fails in the middle of a product: all leave, say who it was, and train on."""
    seen = run(
        tmp_path, strategy="ddp", devices=2, epochs=2, fail=[1, 12],
        callback={"hvp": "recompute", "blocks": None},
    )  # fmt: skip
    for rank in seen:
        assert rank["seconds"] < 60
        assert rank["history"] == []
    told = [text for text in seen[0]["warnings"] if "training goes on" in text]
    assert len(told) == 2  # at both validations
    assert all("Rank 1 failed" in text and "memory has run out" in text for text in told)
    assert not [text for text in seen[1]["warnings"] if "training goes on" in text]
    assert (tmp_path / "weights.pt").exists()

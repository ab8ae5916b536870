"""Measurements of parameters that `fully_shard` has spread over ranks, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.job import LARGEST_LAYER, Network, measured
from support.launching import launch, run


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What two and four ranks saw; the two trained, and so did two that measured nothing."""
    folder = tmp_path_factory.mktemp("fsdp2")
    common = {"strategy": "fsdp2", "blocks": "layer"}
    callback = {"num_eigenvalues": 3, "num_batches": 2, "blocks": None}
    return {
        "folder": folder,
        "plain": run(folder / "plain", devices=2, epochs=2, **common),
        2: run(folder / "2", devices=2, epochs=2, probe=6, callback=callback, **common),
        4: run(folder / "4", devices=4, probe=3, **common),
    }


@pytest.mark.parametrize(("world", "count"), [(2, 6), (4, 3)])
def test_shards_give_what_the_whole_gives(jobs, world, count):
    """Six batches with a ragged last one over two ranks; three batches over four ranks."""
    alone = measured(Network(), count, blocks="layer")
    for seen in jobs[world]:
        found = seen["probe"]
        assert found["num_converged"] == 8
        assert found["num_samples"] == alone["num_samples"]
        for key in ("eigenvalues", "frobenius", "trace", "trace_std_error", "loss", "ratio"):
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_holds_its_share_of_the_basis(jobs, world):
    size = sum(p.numel() for p in Network().parameters())
    held = [seen["probe"]["bytes_of_a_vector"] for seen in jobs[world]]
    assert sum(held) == 8 * size
    # Rows are dealt out layer by layer, so that a rank has up to a row more of each.
    assert max(held) <= 8 * (size / world + 6 + 1 + 9 + 1 + 2)


@pytest.mark.parametrize("world", [2, 4])
def test_no_more_than_a_layer_is_ever_whole(jobs, world):
    for seen in jobs[world]:
        assert 0 < seen["probe"]["largest_whole"] <= LARGEST_LAYER


def test_the_callback_measures_and_training_is_bit_identical(jobs):
    folder: Path = jobs["folder"]
    for seen in jobs[2]:
        assert len(seen["history"]) == 2
        assert all(row["num_converged"] == 3 for row in seen["history"])
    assert [seen["draw"] for seen in jobs["plain"]] == [seen["draw"] for seen in jobs[2]]
    before, after = (torch.load(folder / name / "weights.pt") for name in ("plain", "2"))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


@pytest.mark.parametrize(
    ("where", "after", "word"),
    [
        ("forward", 0, "memory has run out"),  # in the first loss of all
        ("within", 11, "memory has run out"),  # the others wait for its part of the next layer
        ("backward", 11, "memory has run out"),
        ("nan", 2, "The loss of probe batch 5 is nan"),
        ("nan", 11, "NaN or infinite"),
    ],
)
def test_a_rank_that_fails_takes_none_along(tmp_path, where, after, word):
    """All leave within seconds, the message names the rank, and training goes on."""
    seen = run(
        tmp_path, strategy="fsdp2", devices=2, epochs=1, fail=[1, after, where],
        callback={"hvp": "recompute", "blocks": None},
    )  # fmt: skip
    for rank in seen:
        assert rank["seconds"] < 30
        assert rank["history"] == []
    (told,) = [text for text in seen[0]["warnings"] if "training goes on" in text]
    assert word in told
    assert "Rank 1 failed" in told or (after == 11 and where == "nan")  # which is in the sum of all
    assert (tmp_path / "weights.pt").exists()


def test_tensor_parallelism_is_measured_and_training_is_bit_identical(tmp_path):
    """Two layers in shards, one that every rank holds: both in pieces while it is measured."""
    common = {"strategy": "tensor", "devices": 2, "epochs": 2, "blocks": "layer"}
    callback = {"num_eigenvalues": 3, "num_batches": 2, "blocks": None}
    plain = run(tmp_path / "plain", **common)
    seen = run(tmp_path / "measured", probe=6, callback=callback, **common)
    alone = measured(Network(), 6, blocks="layer")
    for rank in seen:
        found = rank["probe"]
        for key in ("eigenvalues", "frobenius", "trace", "trace_std_error", "loss", "ratio"):
            np.testing.assert_allclose(found[key], alone[key], rtol=1e-5, err_msg=key)
        assert [row["num_converged"] for row in rank["history"]] == [3, 3]
        assert 0 < found["largest_whole"] <= LARGEST_LAYER + 1  # nine numbers in two equal parts
    held = [rank["probe"]["bytes_of_a_vector"] for rank in seen]
    assert sum(held) == 8 * sum(p.numel() for p in Network().parameters())
    assert [rank["draw"] for rank in plain] == [rank["draw"] for rank in seen]
    before, after = (torch.load(tmp_path / name / "weights.pt") for name in ("plain", "measured"))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def test_tensor_parallelism_beside_fully_shard_is_refused_before_training(tmp_path):
    done = launch(tmp_path, strategy="both", devices=4, callback={})
    assert done.returncode != 0
    assert "measure a checkpoint on one device" in done.stderr
    assert "Parameter '" in done.stderr

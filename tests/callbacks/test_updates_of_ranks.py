"""The last update on two ranks: in shards of `fully_shard` what it is of whole parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launching import run


def test_in_shards_it_is_that_of_whole_parameters(tmp_path: Path) -> None:
    found = {
        strategy: run(
            tmp_path / strategy, strategy=strategy, devices=2, epochs=2, callback={"blocks": None}
        )
        for strategy in ("ddp", "fsdp2")
    }
    assert all(ranks[0]["history"] == ranks[1]["history"] for ranks in found.values())
    whole, shards = (ranks[0]["history"] for ranks in found.values())
    assert len(whole) == len(shards) == 2
    for one, other in zip(whole, shards, strict=True):
        for name in ("update_curvature", "predicted_change", "actual_change", "update_share"):
            key = f"stability/{name}"
            assert other[key] == pytest.approx(one[key], rel=1e-5)
        assert one["stability/predicted_change"] == pytest.approx(
            one["stability/actual_change"], rel=0.2
        )

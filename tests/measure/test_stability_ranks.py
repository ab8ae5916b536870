"""Stability over two ranks is that of one process, whatever the optimizer keeps in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launching import two_ranks_are_alike


@pytest.mark.parametrize("kind", ["data", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_have_the_stability_of_one_process(kind: str, tmp_path: Path) -> None:
    two_ranks_are_alike("stability_ranks.py", kind, tmp_path)

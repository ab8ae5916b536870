"""A session over two ranks has the gradient and the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launching import two_ranks_are_alike


@pytest.mark.parametrize("kind", ["data", "fsdp2", "fsdp1", "tensor"])
def test_two_ranks_have_the_gradient_of_one_process(kind: str, tmp_path: Path) -> None:
    two_ranks_are_alike("gradient_ranks.py", kind, tmp_path)

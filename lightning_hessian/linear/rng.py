"""Random number generators: seeded, and put back as they were."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Kinds of random number generators."""


def restorer(generator: Any) -> Callable[[], None]:
    """Return what puts a generator of one of these kinds back to its present state."""
    if isinstance(generator, np.random.Generator):
        state = copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def global_restorer() -> Callable[[], None]:
    """Return what puts Python's, NumPy's and torch's generators back to their present states."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return restore


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Open a block after which Python's, NumPy's and torch's generators are as they were before."""
    restore = global_restorer()
    try:
        yield
    finally:
        restore()


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators; call it inside `preserved_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

"""Values of which the law is known."""

from __future__ import annotations

import numpy as np


def pareto(exponent: float, size: int, seed: int, cutoff: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng((seed, size))
    return cutoff * (rng.pareto(exponent - 1.0, size) + 1.0)

"""About how long a row takes on one core: for the order of a run, and no more than that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rows import Gradients, Hessian, Network, Row

_FULL = {"mnist": 60_000, "fashion-mnist": 60_000, "avila": 10_430, "shakespeare": 3_906}

_RATE = 8e9  # multiplications a second, of one core on small layers
_STEPS = 6_500  # products of both protocols, for 1000 eigenvalues
_VECTORS = 6_000  # multiplications for each parameter, against the basis: four passes over 1500
_OVERHEAD = 0.1  # minutes to start a process and to read the data


def expected_minutes(rows: Sequence[Row]) -> float:
    """Return about how many minutes the rows of one network take."""
    network = rows[0].network
    parameters, per_sample = _size(network)
    count = network.data.count or _FULL.get(network.data.name, 50_000)
    work = 0.0
    recipe = network.recipe
    if recipe is not None:
        seen = recipe.epochs * count
        if recipe.steps is not None:
            seen = recipe.steps * min(recipe.batch_size, count)
        work += 3 * per_sample * seen
    spectra = {
        (row.epoch, row.measure.probe, row.measure.data)
        for row in rows
        if isinstance(row.measure, Hessian)
    }
    for _, probe, _ in spectra:
        work += _STEPS * (6 * per_sample * (probe or count) + _VECTORS * parameters)
    for run in {row.measure.run for row in rows if isinstance(row.measure, Gradients)}:
        work += 3 * per_sample * run.count * run.batch_size + run.count**2 * parameters / 4
        work += 3 * run.count**3
    return _OVERHEAD + work / _RATE / 60


def _size(network: Network) -> tuple[float, float]:
    """Return the number of parameters, and of multiplications that a sample takes."""
    if network.model == "lenet":
        return 62e3, 0.5e6
    if network.model == "resnet18":
        return 11e6, 0.56e9
    if network.model == "gpt-nano":
        return 10.7e6, 2.8e9
    found = re.match(r"\w+-(\d+)x(\d+)", network.model)
    assert found is not None
    layers, width = int(found[1]), int(found[2])
    inputs, outputs = (10, 12) if network.data.name == "avila" else (784, 10)
    sizes = [inputs, *[width] * (layers - 1), outputs]
    total = sum(a * b for a, b in pairwise(sizes))
    return total, 1.5 * total

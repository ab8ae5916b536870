"""Tests of the entries of stored gradients, each rank testing the rows that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.gradients.history import GradientHistory
from lightning_hessian.operators.gradients.rows import summed
from lightning_hessian.results import RowTests, SortedMagnitudes
from lightning_hessian.statistics.gaussianity import row_tests

MOST_MAGNITUDES = 100_000
"""Of a sorted row; more would be seen on no plot, and a row of G can be as long as a model."""


def entry_tests(
    history: GradientHistory, max_tested: int | None, significance: float, seed: int
) -> tuple[RowTests, RowTests]:
    """Return the tests of the gradients over dimensions, and of the parameters over iterations.

    Of each, the row of median KS distance is kept as it is, sorted.
    """
    rng = np.random.default_rng(seed)

    def chosen(count: int) -> NDArray[np.int64] | None:
        if max_tested is None or max_tested >= count:
            return None
        return np.sort(rng.choice(count, max_tested, replace=False))

    ranks = history.shard.ranks
    gradients, parameters = chosen(history.num_gradients), chosen(history.size)
    num_gradients = history.num_gradients if gradients is None else len(gradients)
    here = history.shard
    if parameters is not None:
        here = here.restricted(torch.from_numpy(parameters))[0]
    over_dimensions = _rows_tested(
        history.by_gradient(gradients), Shard.even(num_gradients, ranks), significance, seed
    )
    over_iterations = _rows_tested(history.by_parameter(parameters), here, significance, seed + 1)
    return (
        _with_typical(over_dimensions, gradients, partial(_gradient, history)),
        _with_typical(over_iterations, parameters, partial(_parameter, history)),
    )


def _with_typical(
    tests: RowTests, chosen: NDArray[np.int64] | None, entries: Callable[[int], Tensor]
) -> RowTests:
    """Return the tests with the magnitudes of the row of median distance."""
    known = np.flatnonzero(np.isfinite(tests.ks_distances))
    if not len(known):
        return tests
    row = int(known[np.argsort(tests.ks_distances[known], kind="stable")[len(known) // 2]])
    index = row if chosen is None else int(chosen[row])
    magnitudes = entries(index).abs().double().cpu()
    largest = magnitudes.topk(min(MOST_MAGNITUDES, len(magnitudes))).values.numpy()
    found = SortedMagnitudes(index, largest[largest > 0], len(magnitudes))
    return replace(tests, typical=found)


def _gradient(history: GradientHistory, index: int) -> Tensor:
    """Return one gradient [n], whole on every rank."""
    part = torch.from_numpy(history.values[index].copy())
    return history.shard.gather(part.to(history.shard.ranks.device))


def _parameter(history: GradientHistory, index: int) -> Tensor:
    """Return one parameter's entries over the iterations [T], on every rank."""
    _, held = history.shard.restricted(torch.tensor([index]))
    columns = torch.from_numpy(history.values[:, held.numpy()].astype(np.float64))
    # Of several ranks one holds it, and the others add an empty sum.
    return summed(columns.sum(dim=1), history.shard.ranks)


def _rows_tested(
    blocks: Iterator[NDArray[Any]], rows: Shard, significance: float, seed: int
) -> RowTests:
    """Return the tests of all rows, of which each rank is given a share, block by block."""
    ranks = rows.ranks
    results = torch.zeros(2, rows.length, dtype=torch.float64)
    places = torch.arange(rows.size)[rows.positions]
    done, one = 0, None
    for block in blocks:
        with ranks.together():
            if len(block):
                one = row_tests(
                    block, significance=significance, seed=seed, first=int(places[done])
                )
                part = results[:, done : done + len(block)]
                part[0], part[1] = map(torch.from_numpy, (one.ks_distances, one.p_values))
                done += len(block)
    whole = rows.gather(results.to(ranks.device)).cpu().numpy()
    # A rank without rows does not know K; the others do.
    empty = np.empty(0)
    known = ranks.all_gather_object(one and replace(one, ks_distances=empty, p_values=empty))
    one = next(found for found in known if found is not None)
    found: RowTests = replace(one, ks_distances=whole[0], p_values=whole[1])
    return found

"""Tests of the entries of stored gradients, each rank testing the rows that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.gradients.history import GradientHistory
from lightning_hessian.results import RowTests
from lightning_hessian.statistics.gaussianity import row_tests


def entry_tests(
    history: GradientHistory, max_tested: int | None, significance: float, seed: int
) -> tuple[RowTests, RowTests]:
    """Return the tests of the gradients over dimensions, and of the parameters over iterations."""
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
    return (
        _rows_tested(
            history.by_gradient(gradients), Shard.even(num_gradients, ranks), significance, seed
        ),
        _rows_tested(history.by_parameter(parameters), here, significance, seed + 1),
    )


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

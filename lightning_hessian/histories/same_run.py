"""A run that was logged twice (two loggers, a copied folder) is one run, and counts as one.

Five seeds that each wrote a CSV and a W&B folder are five witnesses, not ten: counted twice, they
halve every p-value's ground. The callbacks write an identity into each logger, once for each fit
and kept across a resume. Runs without one are the same where their series are.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_hessian.histories.run_table import RunRecord, RunTable

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 2**16  # of a file of identities; each resume adds a line of 90 bytes
_NAMED = 5  # in the warning; the report names all
Relation = Literal["same", "continued", "apart", "unrelated"]


def identities_in(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the identities among logged rows (keys ``identity/<callback>``), each once."""
    found = (
        value
        for row in rows
        for key, value in row.items()
        if "identity/" in key and isinstance(value, str) and _IDENTITY.fullmatch(value)
    )
    return tuple(dict.fromkeys(found))


def identities_beside(folder: Path) -> tuple[str, ...]:
    """Return the identities in the files ``identity_<callback>.jsonl`` of a run's folder."""
    rows = []
    for file in sorted(folder.glob("identity_*.jsonl")):
        if not file.is_file() or file.is_symlink() or file.stat().st_size > _MOST_BYTES:
            continue
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # a torn line: the run is then told by its series
                continue
            rows += [row] if isinstance(row, dict) else []
    return identities_in(rows)


def each_run_once(
    table: RunTable, statistics: Sequence[str], monitors: Sequence[str], *, warn: bool = True
) -> RunTable:
    """Return the table with every run once, and warn of those that were there several times.

    Two records are one run where they have an identity in common and nothing against it, or where
    the steps and values (to float32) of all statistics and monitored metrics are equal; one of the
    two may have been copied before it ended. The parts of a run that was resumed are put together.
    Records with one identity that contradict each other began at one checkpoint: they stay apart,
    and it is told that they are not independent.

    Args:
        table: The runs.
        statistics: Keys of statistics.
        monitors: Keys of monitored metrics.
        warn: Whether copies are warned of; `RunTable.copies` names them in any case.
    """
    keys = (tuple(statistics), tuple(monitors))
    runs = list(table.runs)
    leader = list(range(len(runs)))
    apart: list[str] = []

    def first(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    for one, two in _candidates(runs, statistics):
        relation = _relation(runs[one], runs[two], *keys)
        if relation in ("same", "continued"):
            low, high = sorted((first(one), first(two)))
            leader[high] = low
        elif relation == "apart":
            apart.append(
                f"{runs[one].name} and {runs[two].name} began as one run and differ since: they "
                "are not independent of each other"
            )
    members: dict[int, list[RunRecord]] = {}
    for index, run in enumerate(runs):
        members.setdefault(first(index), []).append(run)
    groups = [_fullest_first(group, *keys) for group in members.values()]
    told = [_sentence(*group) for group in groups if len(group) > 1]
    if not told and not apart:
        return table
    if told and warn:
        more = f"; and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
        count = "1 run" if len(groups) == 1 else f"{len(groups)} runs"
        named = "; ".join(told[:_NAMED])
        warnings.warn(f"{len(runs)} records are {count}: {named}{more}.", stacklevel=3)
    kept = tuple(_together(*group) for group in groups)
    return replace(table, runs=kept, copies=(*table.copies, *told, *apart))


def _candidates(runs: Sequence[RunRecord], statistics: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of runs with an identity or a measured value in common, each pair once."""
    holders: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        marks: set[Any] = set(run.identities)
        for key in statistics:
            values = run.series(key)
            seen = np.isfinite(values)
            singles = values[seen].astype(np.float32).tolist()
            marks |= {(key, *at) for at in zip(run.steps[seen].tolist(), singles, strict=True)}
        for mark in marks:
            holders.setdefault(mark, []).append(index)
    # Neighbours are enough: what is equal to the same run is equal.
    yield from sorted({pair for indices in holders.values() for pair in pairwise(indices)})


def _relation(
    one: RunRecord, two: RunRecord, statistics: Sequence[str], monitors: Sequence[str]
) -> Relation:
    akin = bool(set(one.identities) & set(two.identities))
    first, second = _measured(one, statistics), _measured(two, statistics)
    shared = [key for key in statistics if key in one.columns and key in two.columns]
    if akin and (not shared or not len(first) or not len(second)):
        return "same"  # a logger with a prefix, or one that was given no statistics
    common = np.intersect1d(first, second)
    if not len(common):
        if akin and (first.max() < second.min() or second.max() < first.min()):
            return "continued"
        return "same" if akin else "unrelated"
    watched = [key for key in monitors if not akin or (key in one.columns and key in two.columns)]
    equal = all(
        np.array_equal(_at(one, key, common), _at(two, key, common), equal_nan=True)
        for key in (*shared, *watched)
    )
    if not equal:
        return "apart" if akin else "unrelated"
    if akin:
        return "same"
    same_keys = all((key in one.columns) == (key in two.columns) for key in statistics)
    inside = len(common) in (len(first), len(second))
    watches = any(np.isfinite(_at(one, key, common)).any() for key in monitors)
    return "same" if shared and same_keys and inside and watches else "unrelated"


def _measured(run: RunRecord, statistics: Sequence[str]) -> Any:
    """Return the steps at which a run has a statistic."""
    seen = [np.isfinite(run.series(key)) for key in statistics if key in run.columns]
    return run.steps[np.any(seen, axis=0)] if seen else run.steps[:0]


def _at(run: RunRecord, key: str, steps: Any) -> Any:
    """Return the values of a key at steps that the run has, to float32."""
    return run.series(key)[np.searchsorted(run.steps, steps)].astype(np.float32)


def _fullest_first(
    group: Sequence[RunRecord], statistics: Sequence[str], monitors: Sequence[str]
) -> list[RunRecord]:
    def values(run: RunRecord) -> int:
        return int(sum(np.isfinite(run.series(k)).sum() for k in (*statistics, *monitors)))

    kept = max(group, key=values)  # of equal ones the first
    return [kept, *(run for run in group if run is not kept)]


def _sentence(kept: RunRecord, *others: RunRecord) -> str:
    named = ", ".join(f"{run.name} ({run.kind}, {run.source})" for run in others)
    verb = "are" if len(others) > 1 else "is"
    return f"{named} {verb} the same run as {kept.name}, counted once"


def _together(kept: RunRecord, *others: RunRecord) -> RunRecord:
    """Return the fullest record, with the rows of others before and after it."""
    for other in others:
        if not len(other) or not len(kept):
            continue
        outside = (other.steps < kept.steps[0]) | (other.steps > kept.steps[-1])
        if outside.any():
            steps = np.concatenate([kept.steps, other.steps[outside]])
            order = np.argsort(steps, kind="stable")
            columns = {
                key: np.concatenate([kept.series(key), other.series(key)[outside]])[order]
                for key in dict.fromkeys([*kept.columns, *other.columns])
            }
            kept = replace(kept, steps=steps[order], columns=columns)
        kept = replace(kept, config=other.config | kept.config)
    return kept

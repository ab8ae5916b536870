"""`load_runs`: histories from W&B, offline folders, CSV and TensorBoard, in one tidy table."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from lightning_hessian.histories import wandb_runs
from lightning_hessian.histories.cache import RunCache
from lightning_hessian.histories.local_runs import LocalRun, find_all, read_local_run
from lightning_hessian.histories.parallel import Progress, map_runs
from lightning_hessian.histories.run_table import RunRecord, RunTable, with_unique_names
from lightning_hessian.histories.sidecars import join_sidecars
from lightning_hessian.results import ArgumentError, UnreadableFileError, bounds
from lightning_hessian.results.arguments import Rule, checked, flag, num_workers, optional, texts
from lightning_hessian.results.outside import printable, unreadable
from lightning_hessian.results.path_arguments import path_name, paths

Source = str | PathLike[str]
LONG_RUN_KEYS = ("hessian*/*", "gradient*/*", "*loss*", "*error*", "*acc*", "epoch", "identity/*")
"""What is read of a W&B run that is too long to be read whole, beside the monitors."""

_THREADS = 8
_NAMED = 5
"""Runs left out that the warning names one by one."""


class RunLeftOutWarning(UserWarning):
    """A run could not be read; the message names it and the reason."""


def _cache(name: str, value: Any) -> Any:
    """Apply the rule of ``cache``: True, False, or a folder that may yet be made."""
    return path_name(name, value) if isinstance(value, (str, PathLike)) else flag(name, value)


def _filters(name: str, value: Any) -> Any:
    """Apply the rule of ``filters``."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return value
    raise ArgumentError(name, value, "Give a mapping such as {'config.optimizer': 'adam'}.")


RULES: dict[str, Rule] = {
    "source": paths("Give a W&B path, a run folder or a CSV folder, or a list of these."),
    "filters": optional(_filters, "for no filter"),
    "keys": texts("Give a list of keys or globs.", empty=True),
    "cache": _cache,
    "progress": optional(flag, "to show it on a terminal"),
    "workers": optional(num_workers, "for one process a core"),
}


@checked(RULES)
def load_runs(
    source: Source | Iterable[Source],
    *,
    filters: Mapping[str, Any] | None = None,
    keys: Sequence[str] = (),
    cache: bool | Path = True,
    progress: bool | None = None,
    workers: int | None = None,
) -> RunTable:
    r"""Return the histories of runs in one tidy table.

    Read are W&B runs by ``entity/project``, ``entity/project/run`` or their address in the
    browser, through `wandb.Api` and all rows of `scan_history`; and on the disk, in a folder and
    all below it, offline W&B runs, ``metrics.csv`` of Lightning's CSVLogger, TensorBoard event
    files, and ``mlruns`` of MLflow. What exists on the disk is taken to be meant. Where a step was
    logged twice, as after a resume, the later value wins. Of a live, cut or damaged file everything
    whole is used, and `RunTable.problems` names the rest. A run that cannot be read at all, or not
    within the bounds of `lightning_hessian.results.bounds`, is left out with a warning, and the
    others are returned.

    Args:
        source: A W&B path, a file or folder, or several of them.
        filters: For W&B, as in `wandb.Api().runs`: ``{"config.optimizer": "adam"}``.
        keys: Further keys (globs) to read of W&B runs with over 20,000 rows, of which only
            statistics, losses, errors and accuracies are read.
        cache: Whether histories are kept, or in which folder; they are read again when their files
            (or, on the server, their last step) change. Live runs on a server are never kept.
        progress: Whether a line counts the runs; by default on a terminal.
        workers: How many processes; one for each core by default.

    Raises:
        FileNotFoundError: A path does not exist and is no W&B path, or holds no run.
        ValueError: There is no such W&B run, or not one of the runs can be read.
        ConnectionError: The W&B server cannot be reached.

    Example:
        >>> import tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("step,val_loss\n1,0.9\n2,0.7\n")
        >>> table = load_runs(folder, cache=False)
        >>> table.runs[0].series("val_loss").tolist()
        [0.9, 0.7]
    """
    assert not isinstance(source, (str, PathLike))  # by its rule, a list
    sources = list(source)
    usual = user_cache_path("lightning_hessian", appauthor=False)
    folder = (usual if cache else None) if isinstance(cache, bool) else Path(cache)
    kept, shown = RunCache(folder), Progress(progress)
    remote, local = _told_apart(sources)
    if filters and not remote:
        raise ArgumentError(
            "filters", filters, "They choose among the runs of a W&B project, and none was named."
        )
    found = map_runs(
        functools.partial(_read_cached, kept),
        find_all(local),
        what="read",
        progress=shown,
        workers=workers,
        seconds=bounds.RUN_SECONDS,
        failed=lambda run, why: f"{run.folder}: {why}",
    )
    for place in remote:
        fetch = functools.partial(_fetch_cached, kept, (*LONG_RUN_KEYS, *keys))
        listed = wandb_runs.list_wandb_runs(place, filters)
        found += map_runs(fetch, listed, what="fetched", progress=shown, threads=_THREADS)
    runs, joined = join_sidecars([run for run in found if isinstance(run, RunRecord)])
    skipped = [printable(run) for run in found if isinstance(run, str)]
    kept.prune()
    named = "; ".join(skipped[:_NAMED]) + ("; ..." if len(skipped) > _NAMED else "")
    if not runs:
        raise ValueError(f"Not one of {len(skipped)} run(s) can be read: {named}")
    if skipped:
        left_out = f"{len(skipped)} of {len(runs) + len(skipped)} runs are left out: {named}"
        warnings.warn(left_out, RunLeftOutWarning, stacklevel=2)
    return RunTable(with_unique_names(runs), tuple(skipped), joined)


def _told_apart(sources: Iterable[Source]) -> tuple[list[wandb_runs.WandbPath], list[Path]]:
    remote, local = [], []
    for source in sources:
        found = wandb_runs.parse_wandb_path(source) if isinstance(source, str) else None
        if found is not None and not Path(source).exists():
            remote.append(found)
        else:
            local.append(Path(source))
    return remote, local


def _read_cached(cache: RunCache, run: LocalRun) -> RunRecord | str:
    """Return a run on the disk, or why it cannot be read."""
    try:
        with unreadable(run.folder):
            return _cached(cache, ("local", run.state()), lambda: read_local_run(run))
    except (UnreadableFileError, OSError, ModuleNotFoundError) as error:
        return str(error)


def _fetch_cached(cache: RunCache, wanted: tuple[str, ...], run: Any) -> RunRecord | str:
    """Return a run on a server, or why it cannot be read."""
    try:
        with unreadable(run.url):
            state = wandb_runs.wandb_state(run)
            if not state:
                return wandb_runs.read_wandb_run(run, wanted)
            return _cached(cache, (*state, wanted), lambda: wandb_runs.read_wandb_run(run, wanted))
    except UnreadableFileError as error:
        return str(error)


def _cached(cache: RunCache, key: tuple[Any, ...], read: Callable[[], RunRecord]) -> RunRecord:
    found = cache.get(key)
    if found is None:
        found = read()
        cache.put(key, found)
    return found

"""Runs on a W&B server, through its public API."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_hessian.histories.run_table import RunRecord, cleaned, columns_of, flat_config
from lightning_hessian.histories.same_run import identities_in

_PATH = re.compile(
    r"(?:https?://[^/]+/)?(?P<entity>[\w.-]+)/(?P<project>[\w.-]+)"
    r"(?:/(?:(?P<part>runs|sweeps)/)?(?P<id>[\w.-]+))?(?:/\w+)?/?(?:\?.*)?"
)
_STEPS_AT_ONCE = 20_000
"""Up to here a run is read whole; a longer one column by column, where columns are sparse."""

_PAGE = 2000
ENDED = ("finished", "crashed", "failed", "killed")


@dataclass(frozen=True)
class WandbPath:
    """What a W&B path means: a project, one run, or the runs of one sweep.

    Attributes:
        project: ``entity/project``.
        run_id: Set where one run is meant.
        sweep_id: Set where a sweep is meant.
    """

    project: str
    run_id: str | None = None
    sweep_id: str | None = None


def parse_wandb_path(text: str) -> WandbPath | None:
    """Return what a path means, None where it cannot be one.

    Example:
        >>> parse_wandb_path("https://wandb.ai/ada/digits/runs/3kf8z")
        WandbPath(project='ada/digits', run_id='3kf8z', sweep_id=None)
        >>> parse_wandb_path("./digits") is None
        True
    """
    found = _PATH.fullmatch(text)
    if found is None or found["entity"] in (".", ".."):
        return None
    project = f"{found['entity']}/{found['project']}"
    if found["part"] == "sweeps":
        return WandbPath(project, sweep_id=found["id"])
    return WandbPath(project, run_id=found["id"])


def list_wandb_runs(path: WandbPath, filters: Mapping[str, Any] | None = None) -> list[Any]:
    """Return the runs of a path, as objects of `wandb.Api`.

    Args:
        path: A project, run or sweep.
        filters: As in `wandb.Api().runs`, for example ``{"config.optimizer": "adam"}``.

    Raises:
        ValueError: There is no such run or project, or nobody is logged in.
        ConnectionError: The server cannot be reached.
    """
    import wandb

    try:
        api = wandb.Api(timeout=30)
        if path.run_id:
            return [api.run(f"{path.project}/{path.run_id}")]
        chosen = dict(filters or {}) | ({"sweep": path.sweep_id} if path.sweep_id else {})
        runs = list(api.runs(path.project, filters=chosen, lazy=False))
    except Exception as error:
        raise explained(error, path) from error
    if not runs:
        what = " that pass the filters" if filters else ""
        raise ValueError(f"{path.project} has no runs{what}.")
    return runs


def wandb_state(run: Any) -> tuple[Any, ...]:
    """Return what changes whenever the history of a run does; nothing for one that still runs."""
    if run.state not in ENDED:
        return ()
    return ("wandb", run.url, run.state, run.lastHistoryStep, getattr(run, "heartbeat_at", None))


def read_wandb_run(run: Any, wanted: Iterable[str]) -> RunRecord:
    """Return the history of a run, by `scan_history`.

    Args:
        run: An object of `wandb.Api`.
        wanted: The keys that are read of a run too long to be read whole; globs.

    Raises:
        ConnectionError: The server went away.
    """
    problems = []
    try:
        last = run.lastHistoryStep
        if last <= _STEPS_AT_ONCE:
            rows = list(run.scan_history(page_size=_PAGE))
        else:
            # A scan with several keys would return only the rows that hold all of them.
            logged = (run.history_keys or {}).get("keys", {})
            keys = [key for key in logged if any(fnmatchcase(key, glob) for glob in wanted)]
            counted = [key for key in ("trainer/global_step",) if key in logged]
            rows = []
            for key in keys:
                rows += run.scan_history(keys=[key, "_step", *counted], page_size=_STEPS_AT_ONCE)
            rows.sort(key=lambda row: row["_step"])
            problems.append(f"{last + 1} rows: only {', '.join(keys) or 'nothing'} was read")
        config = flat_config(run.config)
    except Exception as error:
        raise explained(error, WandbPath(f"{run.entity}/{run.project}", run.id)) from error
    if run.state not in ENDED:
        problems.append(f"the run is {run.state}: more rows may come")
    steps, columns = columns_of(rows)
    path, identities = f"{run.entity}/{run.project}/{run.id}", identities_in(rows)
    name, kind = run.name or run.id, "wandb"
    return cleaned(
        RunRecord(run.id, name, path, kind, config, steps, columns, tuple(problems), identities)
    )


def explained(error: Exception, path: WandbPath) -> Exception:
    """Return an error that says what to do; one that is not W&B's is handed back."""
    where = "/".join(filter(None, (path.project, path.run_id)))
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if "Could not find" in text or "not found" in text.lower() or "404" in text:
        return ValueError(
            f"{where}: no such W&B run or project, and no such folder ({text[:150]}). "
            "Check the spelling, and that your account may see it."
        )
    if any(words in text for words in ("invalid credentials", "API key", "api_key", "401")):
        return ValueError(
            f"{where}: no such folder here, and W&B does not know you ({text[:150]}). Run "
            "`wandb login`, set WANDB_API_KEY, or give a run folder."
        )
    from_a_client = type(error).__module__.split(".")[0] in ("wandb", "requests", "urllib3")
    if from_a_client or isinstance(error, OSError):  # as TimeoutError is
        return ConnectionError(
            f"{where}: the W&B server did not answer ({kind}: {text[:150]}). Check the network "
            "and WANDB_BASE_URL, or give an offline run folder."
        )
    return error

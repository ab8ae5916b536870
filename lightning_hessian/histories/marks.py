"""The mark in a folder of spectra that were measured beside a run: which run that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hessian.results.outside import inside, parse_json, printable, read_bounded

MARK = "sidecar.json"
"""The file that makes a folder of spectra that of a sidecar."""

CONFIG = "sidecar"
"""The part of a configuration that says the same of a W&B run."""

LOGGED_STEP = "logged_step"
"""The column with the step under which the run's own loggers have the metrics of a checkpoint."""

_BYTES = 64 * 2**10
_TEXTS = ("run_id", "folder", "split", "identity", "checkpoints")


@dataclass(frozen=True)
class Mark:
    """Which run a folder of spectra was measured beside.

    Attributes:
        run_id: Its id at W&B; empty where it has none.
        folder: Its folder, symbolic links followed; empty where that is not known.
        split: The data of the probe, ``"train"`` or ``"val"``.
        identity: Of the sidecar: what several loggers of it share.
        ended: Whether the sidecar has nothing more to measure.
        checkpoints: The folder that it follows.
    """

    run_id: str = ""
    folder: str = ""
    split: str = "train"
    identity: str = ""
    ended: bool = False
    checkpoints: str = ""

    def config(self) -> dict[str, dict[str, str]]:
        """Return what a logger's configuration says of it."""
        return {CONFIG: {"run": self.run_id, "folder": self.folder, "split": self.split}}


def read_mark(folder: Path) -> Mark | None:
    """Return the mark of a sidecar's folder, None where there is none that can be read."""
    file = folder / MARK
    try:
        if not file.exists():
            return None
        inside(file, folder)
        found = parse_json(read_bounded(file, _BYTES).decode("utf-8", errors="replace"))
    except (ValueError, OSError):
        return None
    if not isinstance(found, dict):
        return None
    texts = {name: found.get(name) for name in _TEXTS}
    given = {name: printable(text, 4096) for name, text in texts.items() if isinstance(text, str)}
    return Mark(**given, ended=found.get("ended") is True)


def by_logged_step(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a sidecar's table, each at the step of the run's loggers."""
    return [
        {key: value for key, value in row.items() if key != LOGGED_STEP}
        | {"step": row.get(LOGGED_STEP, row.get("step"))}
        for row in rows
    ]

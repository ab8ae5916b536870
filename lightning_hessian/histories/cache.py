"""Histories that were read once, kept on the disk until their source changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.histories.run_table import RunRecord, flat_config
from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.npz import read_npz
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.outside import parse_json, unreadable

_FORMAT = 2
_KEPT = 2000
"""How many histories stay; the ones unused longest go first."""

_BYTES = 8 * bounds.TABLE_VALUES + 8 * bounds.JSON_BYTES
"""Of one history: a table as large as any that is read, and its texts."""


class RunCache:
    """Keeps run histories in a folder, or nothing where the folder is None.

    A damaged or unwritable cache is as good as none: the run is read again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: tuple[Any, ...]) -> RunRecord | None:
        """Return the history kept under a key."""
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            with unreadable(path):
                run = _run_of(read_npz(path, most=_BYTES))
            os.utime(path)
        except (OSError, UnreadableFileError):
            return None
        return run

    def put(self, key: tuple[Any, ...], run: RunRecord) -> None:
        """Keep a history under a key."""
        if self.folder is None:
            return
        plain = [f.name for f in fields(RunRecord) if f.name not in ("steps", "columns")]
        meta = {name: getattr(run, name) for name in plain} | {"keys": list(run.columns)}
        values = np.array(list(run.columns.values())).reshape(-1, len(run.steps))
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path(key)) as file:
                np.savez(file, meta=json.dumps(meta), steps=run.steps, values=values)

    def prune(self) -> None:
        """Remove the histories beyond the 2000 used last."""
        if self.folder is None or not self.folder.is_dir():
            return
        with contextlib.suppress(OSError):
            files = sorted(self.folder.glob("*.npz"), key=lambda file: -file.stat().st_mtime)
            for file in files[_KEPT:]:
                file.unlink(missing_ok=True)

    def _path(self, key: tuple[Any, ...]) -> Path:
        assert self.folder is not None
        text = repr((_FORMAT, key))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def _run_of(arrays: dict[str, Any]) -> RunRecord:
    """Return the run in the arrays of a file; whatever is wrong with them raises."""
    meta = parse_json(str(arrays["meta"]))
    steps, values = arrays["steps"], arrays["values"]
    keys = meta.pop("keys")
    if steps.dtype != np.float64 or values.dtype != np.float64:
        raise ValueError("not float64")
    if values.shape != (len(keys), *steps.shape) or steps.ndim != 1:
        raise ValueError(f"{len(keys)} keys, {steps.shape} steps, {values.shape} values")
    texts = {name: meta[name] for name in ("run_id", "name", "source", "kind")}
    problems, identities = tuple(meta["problems"]), tuple(meta["identities"])
    named = (*texts.values(), *keys, *problems, *identities)
    if not all(isinstance(text, str) for text in named):
        raise TypeError("a name that is no text")
    config, columns = flat_config(meta["config"]), dict(zip(keys, values, strict=True))
    read = {"config": config, "steps": steps, "columns": columns}
    return RunRecord(**texts, **read, problems=problems, identities=identities)

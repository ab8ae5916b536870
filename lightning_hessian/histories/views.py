"""What a table of runs says of itself; `results.shown` looks this up when one is first shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.results.escaping import visible
from lightning_hessian.results.shown import Telling
from lightning_hessian.tracking.style import COLOURS, evenly_chosen, quiet_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW, _MOST_CURVES, _MOST_NAMED = 4, 60, 8
_USUAL = ("val_loss", "valid_loss", "validation_loss", "train_loss", "loss", "hessian/loss")


def telling(table: RunTable) -> Telling:
    """Return the names, the rows and the metrics of a table."""
    rows = sum(len(run) for run in table)
    steps = [step for run in table for step in (run.steps[:1].tolist() + run.steps[-1:].tolist())]
    keys = table.keys()
    brief = [
        ("runs", _few([run.name for run in table])),
        ("rows", f"{rows:,}" + (f", steps {min(steps):g} to {max(steps):g}" if steps else "")),
        ("metrics", f"{len(keys)}: {_few(keys)}" if keys else "none"),
    ]
    differing = [key for key in table.config_keys() if table.varies(key)]
    if differing:
        brief.append(("config differs", _few(differing)))
    if table.problems:
        brief.append(("left out", f"{len(table.problems)}; see .problems"))
    more = [("kinds", _few(sorted({run.kind for run in table})))] if len(table) else []
    more += [("copy", text) for text in table.copies[:_FEW]]
    more += [("left out", text) for text in table.problems[:_FEW]]
    return Telling(f"Table of {len(table):,} run{'' if len(table) == 1 else 's'}", brief, more)


def _few(names: Sequence[str]) -> str:
    """Return the first few names, and that there are more."""
    return ", ".join([*names[:_FEW], *(["..."] if len(names) > _FEW else [])]) or "none"


def draw(table: RunTable, axes: Axes, key: str | None = None) -> None:
    """Draw a metric of at most 60 runs, evenly chosen, over their steps."""
    chosen = key or _usual(table)
    drawn: list[RunRecord] = [run for run in table if np.isfinite(run.series(chosen)).any()]
    for place, run in enumerate(evenly_chosen(drawn, _MOST_CURVES)):
        values = run.series(chosen)
        seen = np.isfinite(values)
        axes.plot(
            run.steps[seen], values[seen], color=COLOURS[place % len(COLOURS)], linewidth=1.2,
            marker="o" if seen.sum() <= 60 else None, markersize=2.5, label=_plain(run.name),
        )  # fmt: skip
    axes.set(xlabel="step", ylabel=_plain(chosen))
    quiet_grid(axes)
    if 1 < len(drawn) <= _MOST_NAMED:
        axes.legend(frameon=False, fontsize="x-small")


def _usual(table: RunTable) -> str:
    """Return the metric that is drawn where none is named."""
    keys = table.keys()
    if not keys:
        raise ValueError("No run logged a number, so there is nothing to draw.")
    losses = [key for key in keys if "loss" in key]
    return next((key for key in _USUAL if key in keys), (losses or keys)[0])


def columns(table: RunTable) -> Mapping[str, Any]:
    """Return the tidy rows as columns: run, name, ``config.<key>``, step and the metrics."""
    rows = list(table.rows())
    names = ["run", "name", *(f"config.{key}" for key in table.config_keys()), "step"]
    texts = {name: [row.get(name) for row in rows] for name in names}
    return texts | {key: [row.get(key, math.nan) for row in rows] for key in table.keys()}  # noqa: SIM118


def _plain(key: str) -> str:
    """Return a name that matplotlib takes for words, dollar signs and all."""
    shown = visible(key).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # it hides labels with an underscore

"""What `nano` and `finetune` keep of a measurement, and what several of them show.

The verdict is the one that reports give: see `lightning_hessian.statistics.verdict`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian import fit_power_law
from lightning_hessian.reports.verdicts import interval_text, number
from lightning_hessian.results import FloatArray, HessianSpectrum
from lightning_hessian.statistics.correlation import pearson
from lightning_hessian.statistics.verdict import (
    Movement,
    Verdict,
    answer,
    corrected,
    movement,
    verdict,
    which_of_two,
)

STATISTICS = ("d_ks", "s_hat", "lambda_1", "trace")
MONITORS = ("test_loss", "gap")
FIRST_STEPS = 100
"""Before this step everything drifts."""

CUTOFFS = (20, 30, 50, 100, 150, 200, 333, 500, 1000)

Found = dict[tuple[str, str], Movement]
"""How a statistic and a monitored number move, by both names."""


def add_row(path: Path, held: dict[str, Any], row: dict[str, Any]) -> None:
    """Add a measurement to what a run holds, and replace its file as a whole."""
    held["rows"].append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(held))
    path.with_suffix(".part").replace(path)


def summary(spectrum: HessianSpectrum) -> dict[str, Any]:
    """Return what is kept of a spectrum."""
    return {
        "eigenvalues": [float(f"{value:.7g}") for value in spectrum.eigenvalues],
        "num_converged": spectrum.num_converged,
        "num_copies": spectrum.num_copies,
        "trace": spectrum.trace,
        "trace_std_error": spectrum.trace_std_error,
        "num_parameters": spectrum.num_parameters,
        "num_hvps": spectrum.num_hvps,
        "dtype": spectrum.dtype,
        "seconds": round(spectrum.seconds, 1),
    }


def series(rows: Sequence[dict[str, Any]], part: str) -> dict[str, FloatArray]:
    """Return each statistic of one part over the rows, and what it is held against.

    A power law is fitted to the same K in all rows: as many as there are in each of them, converged
    and positive (positive only, where Ritz values are pooled, as HPL does).
    """
    counts = [usable(row[part], part) for row in rows]
    k = min(counts)
    fits = [fit_power_law(row[part]["eigenvalues"][:k]) if k > 1 else None for row in rows]
    found = {
        "d_ks": [np.nan if fit is None else fit.ks_distance for fit in fits],
        "d_c": [np.nan if fit is None else fit.critical_value for fit in fits],
        "s_hat": [np.nan if fit is None else fit.slope for fit in fits],
        "lambda_1": [row[part]["eigenvalues"][0] for row in rows],
        "trace": [row[part]["trace"] for row in rows],
        "test_loss": [row["test_loss"] for row in rows],
        "gap": [row["test_loss"] - row["train_loss"] for row in rows],
        "k": [k] * len(rows),
    }
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def print_cutoffs(runs: Sequence[Sequence[dict[str, Any]]], part: str) -> None:
    """Print r(d_ks, test loss) of levels by K: what hangs on it is no property of the network."""
    most = min(usable(row[part], part) for rows in runs for row in rows)
    print(f"\n| K, {part} | r | r from step {FIRST_STEPS} | d_ks at first | d_ks at last | d_c |")
    print("|---|---|---|---|---|---|")
    for k in (k for k in CUTOFFS if k <= most):
        cells: list[list[str]] = [[], [], [], []]
        for rows in runs:
            fits = [fit_power_law(row[part]["eigenvalues"][:k]) for row in rows]
            distances = np.array([fit.ks_distance for fit in fits])
            losses = np.array([row["test_loss"] for row in rows])
            late = np.array([row["step"] >= FIRST_STEPS for row in rows])
            for i, chosen in enumerate((np.ones_like(late), late)):
                cells[i].append(number(pearson(distances[chosen], losses[chosen]).r))
            cells[2].append(f"{distances[0]:.3f}")
            cells[3].append(f"{distances[-1]:.3f}")
        print(f"| {k} | {' | '.join(map(' '.join, cells))} | {fits[-1].critical_value:.3f} |")


def usable(spectrum: dict[str, Any], part: str) -> int:
    """Return how many values a power law may be fitted to."""
    values = np.array(spectrum["eigenvalues"])
    if part == "pooled":
        return int(np.sum(values > 0))
    return min(spectrum["num_converged"], int(np.sum(values > 0)))


def movements(rows: Sequence[dict[str, Any]], part: str) -> Found:
    """Return all pairs of one run, corrected for their number as in a report."""
    held = series(rows, part)
    pairs = [(name, monitor) for monitor in MONITORS for name in STATISTICS]
    found = corrected([movement(held[name], held[monitor]) for name, monitor in pairs])
    return dict(zip(pairs, found, strict=True))


def print_run(name: str, rows: Sequence[dict[str, Any]], part: str) -> None:
    """Print the table of one run and one part, and what the rule says."""
    held = series(rows, part)
    first, last = rows[0]["step"], rows[-1]["step"]
    size = rows[0][part]["num_parameters"]
    print(f"\n### {name}, {part}: K = {held['k'][0]:.0f} of {size:,}, steps {first} to {last}\n")
    print("| statistic | with | n | r | interval | r of differences | interval | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    found = movements(rows, part)
    for (statistic, monitor), pair in found.items():
        level, moved = pair.block, pair.differences
        print(
            f"| {statistic} | {monitor} | {pair.num_points} | {number(pair.r)} "
            f"| {interval_text((level.low, level.high))} | {number(pair.r_differences)} "
            f"| {interval_text((moved.low, moved.high))} | {verdict(pair, monitor).label} |"
        )
    print("\n" + answer([(*names, pair) for names, pair in found.items()]))
    for statistic in STATISTICS:
        both: list[Verdict] = [verdict(found[statistic, monitor]) for monitor in MONITORS]
        print(f"{statistic} goes with: {which_of_two(*both)}.")


def print_course(rows: Sequence[dict[str, Any]], part: str) -> None:
    """Print the statistics of one run, a row a measurement."""
    held = series(rows, part)
    print(f"\n| step | test loss | gap | d_ks | d_c | s_hat | lambda_1 | Tr | {part} converged |")
    print("|---|---|---|---|---|---|---|---|---|")
    for i, row in enumerate(rows):
        cells = [f"{held[name][i]:.3f}" for name in ("test_loss", "gap", "d_ks", "d_c", "s_hat")]
        cells += [f"{held[name][i]:.3g}" for name in ("lambda_1", "trace")]
        converged = f"{row[part]['num_converged']} of {len(row[part]['eigenvalues'])}"
        print(f"| {row['step']} | {' | '.join(cells)} | {converged} |")


def print_over_seeds(runs: Sequence[Sequence[dict[str, Any]]], part: str) -> None:
    """Print the coefficients of several runs side by side, and how often a relation is shown."""
    later = [[row for row in rows if row["step"] >= FIRST_STEPS] for rows in runs]
    found = [[movements(rows, part) for rows in taken] for taken in (runs, later)]
    print(f"\n### {len(runs)} runs, {part}\n")
    print(
        f"| statistic | with | r | r from step {FIRST_STEPS} | r of differences "
        f"| from step {FIRST_STEPS} | shown in |"
    )
    print("|---|---|---|---|---|---|---|")
    for monitor in MONITORS:
        for statistic in STATISTICS:
            pairs = [[run[statistic, monitor] for run in taken] for taken in found]
            cells = [" ".join(number(pair.r) for pair in taken) for taken in pairs]
            cells += [" ".join(number(pair.r_differences) for pair in taken) for taken in pairs]
            shown = [sum(verdict(pair).is_shown for pair in taken) for taken in pairs]
            told = f"{shown[0]} of {len(runs)}; {shown[1]} of {len(runs)}"
            print(f"| {statistic} | {monitor} | {' | '.join(cells)} | {told} |")


def print_findings(paths: Sequence[Path]) -> None:
    """Print what runs have found: each by itself, with and without its first steps, and all."""
    held = [json.loads(path.read_text()) for path in paths]
    for part in ("all", "last", "pooled", "adapters"):
        runs = []
        for one in held:
            rows = sorted(one["rows"], key=lambda row: row["step"])
            rows = [row for row in rows if part in row]
            if len(rows) < 3:
                continue
            runs.append(rows)
            name = f"{one['size']}, seed {one['seed']}"
            print_course(rows, part)
            print_run(name, rows, part)
            later = [row for row in rows if row["step"] >= FIRST_STEPS]
            if len(later) >= 3:
                print_run(name, later, part)
        if len(runs) > 1:
            print_over_seeds(runs, part)
            print_cutoffs(runs, part)

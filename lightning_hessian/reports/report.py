"""Which statistic goes with what is monitored, over one run or a hundred: found, and written."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hessian.histories.load import RULES, Source, load_runs
from lightning_hessian.histories.parallel import Progress
from lightning_hessian.histories.run_table import RunTable
from lightning_hessian.histories.same_run import each_run_once
from lightning_hessian.reports.across import Scaling, across_runs, choose_points
from lightning_hessian.reports.compose import compose
from lightning_hessian.reports.defaults import AUTO, found_group, found_size, named_monitors
from lightning_hessian.reports.document import to_html, to_markdown
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.numbers import write_csv, write_json
from lightning_hessian.reports.verdicts import GAP
from lightning_hessian.reports.within import over_runs, within_runs
from lightning_hessian.results import ArgumentError, arguments
from lightning_hessian.results.arguments import Rule, checked, nonempty_text, optional
from lightning_hessian.results.output import check_folder
from lightning_hessian.results.path_arguments import path_name
from lightning_hessian.statistics.scaling import fit_scaling
from lightning_hessian.tracking.scalars import CORRELATED as OF_SPECTRA
from lightning_hessian.tracking.scalars import GRADIENT_CORRELATED as OF_GRADIENTS

DEFAULT_STATISTICS = (
    *(name if "/" in name else f"hessian/{name}" for name in (*OF_SPECTRA, "loss")),
    *(f"gradient/{name}" for name in OF_GRADIENTS),
)
"""What is correlated where nothing is asked for, as far as a run logged it."""

MIN_RUNS = 4
"""Fewer runs have no correlation across them."""


def _runs(name: str, value: Any) -> Any:
    """Apply the rule of ``runs``: a table, or what `load_runs` takes."""
    return value if isinstance(value, RunTable) else RULES["source"](name, value)


_REPORT_RULES: dict[str, Rule] = {
    **RULES,
    "runs": _runs,
    "monitor": optional(arguments.monitor_names, "for those that the callbacks of the runs had"),
    "statistics": optional(
        arguments.texts("Give keys or globs of statistics, such as 'hessian/*'."),
        "for those that are usual",
    ),
    "at": arguments.row_choice,
    "mode": arguments.one_of("min", "max"),
    "group": optional(nonempty_text, "for no groups"),
    "size": optional(nonempty_text, "for no scaling fits"),
}


@checked(_REPORT_RULES)
def correlation_report(
    runs: RunTable | Source | Iterable[Source],
    *,
    monitor: str | Sequence[str] | None = None,
    statistics: Sequence[str] | None = None,
    at: str | float = "last",
    mode: str = "min",
    group: str | None = AUTO,
    size: str | None = AUTO,
    progress: bool | None = None,
    workers: int | None = None,
) -> CorrelationReport:
    r"""Return which statistics go with the monitored metrics, within runs and across them.

    A run that was logged twice, or copied, counts once; a warning names it.

    Args:
        runs: What `load_runs` returned, or what it takes.
        monitor: The metric, or metrics; the first decides which row is best. By default those that
            the callbacks of the runs had, else ``val_loss`` and ``gap``. ``"gap"`` is the
            generalization gap, ``hessian/gap``; beside other metrics it is left out where no run
            logged it.
        statistics: Keys or globs of statistics; by default those of the Hessian and gradients that
            the callbacks correlate. Every one more makes the correction for their number stricter.
        at: Which row stands for a run across runs: ``"last"``, ``"best"`` (by the monitor), or the
            last one up to a step.
        mode: Whether the best is the ``"min"`` or the ``"max"``.
        group: Config key that colours the runs and whose groups are also looked at one by one; by
            default the optimizer, where the callbacks logged several. None for no groups.
        size: Config key of the model's size, for scaling fits; by default the number of parameters,
            where the callbacks logged three or more. None for no fits.
        progress: Whether a line counts the runs; by default on a terminal.
        workers: How many processes; one for each core by default.

    Raises:
        ValueError: No run has a key that was asked for; the nearest ones are named.
        OSError: As `load_runs`.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> rows = ["1,0.9,0.3", "2,0.7,0.25", "3,0.6,0.1", "4,0.5,0.2", "5,0.45,0.1"]
        >>> text = "\n".join(["step,val_loss,hessian/d_ks", *rows, ""])
        >>> _ = (folder / "metrics.csv").write_text(text)
        >>> (pair,) = correlation_report(folder).within
        >>> pair.statistic, round(pair.r, 2), round(pair.r_differences, 2), pair.num_points
        ('hessian/d_ks', 0.8, -0.12, 5)
    """
    table = runs if isinstance(runs, RunTable) else load_runs(runs, progress=progress)
    asked = named_monitors(*(run.config for run in table)) if monitor is None else monitor
    monitors = resolved_monitors(asked, table.keys())
    for key in monitors:
        table.require(key, argument="monitor")
    chosen = _statistics(table, statistics, monitors)
    table = each_run_once(table, chosen, monitors)
    group, size = found_group(table, group), found_size(table, size)
    shown = Progress(progress)
    points, across, scaling = None, [], []
    if len(table) >= MIN_RUNS or group or size:
        points = choose_points(table, chosen, monitors, at=at, mode=mode, group=group, size=size)
    if points is not None and len(table) >= MIN_RUNS:
        across = across_runs(points, chosen, monitors)
        if size:
            scaling = [
                Scaling(key, size, fit_scaling(points.sizes, points.values[key]))
                for key in (*monitors, *chosen)
            ]
    within = within_runs(table, chosen, monitors, progress=shown, workers=workers)
    settings = {"monitor": list(monitors), "at": at, "mode": mode, "group": group, "size": size}
    return CorrelationReport(
        table=table,
        statistics=chosen,
        monitors=monitors,
        points=points if len(table) >= MIN_RUNS else None,
        across=tuple(across),
        scaling=tuple(scaling),
        within=tuple(within),
        over=tuple(over_runs(within)),
        settings=settings,
    )


def _a_report(name: str, value: Any) -> CorrelationReport:
    if isinstance(value, CorrelationReport):
        return value
    raise ArgumentError(name, value, "Give what correlation_report(...) returned.")


@checked({"report": _a_report, "out": path_name})
def write_report(report: CorrelationReport, out: str | PathLike[str]) -> Path:
    r"""Write report.html, report.md with its figures, correlations.csv and correlations.json.

    Args:
        report: What was found.
        out: Folder; made if missing.

    Returns:
        The path of report.html.

    Raises:
        ArgumentError: Nothing can be written to ``out``; found before anything is drawn.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = ["step,val_loss,hessian/trace", *(f"{i},{1 / (i + 1)},{i}" for i in range(6))]
        >>> _ = (folder / "metrics.csv").write_text("\n".join(rows))
        >>> write_report(correlation_report(folder), folder / "report").name
        'report.html'
    """
    folder = Path(out)
    check_folder(folder, "out")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    document = compose(report)
    for drawing in document.drawings:
        file = folder / "figures" / f"{drawing.name}.svg"
        file.write_text(drawing.standalone, encoding="utf-8", errors="replace")
    (folder / "report.md").write_text(to_markdown(document), encoding="utf-8", errors="replace")
    write_csv(report, folder / "correlations.csv")
    write_json(report, folder / "correlations.json")
    page = folder / "report.html"
    page.write_text(to_html(document), encoding="utf-8", errors="replace")
    return page


def resolved_monitors(monitor: str | Sequence[str], keys: Collection[str]) -> tuple[str, ...]:
    """Return the keys under which monitored metrics were logged.

    Args:
        monitor: The metric, or metrics, as they were asked for; ``"gap"`` is ``hessian/gap``.
        keys: What was logged.

    Raises:
        ValueError: None was named.

    Example:
        >>> resolved_monitors(("val_loss", "gap"), ["val_loss", "hessian/gap"])
        ('val_loss', 'hessian/gap')
        >>> resolved_monitors(("val_loss", "gap"), ["val_loss"])
        ('val_loss',)
    """
    asked = (monitor,) if isinstance(monitor, str) else tuple(monitor)
    if not asked:
        raise ValueError("No monitor was named; give a logged metric such as 'val_loss'.")
    named = dict.fromkeys(GAP if key == "gap" and "gap" not in keys else key for key in asked)
    return tuple(key for key in named if key != GAP or GAP in keys) or tuple(named)


def logged_statistics(keys: Collection[str], monitors: Sequence[str]) -> tuple[str, ...]:
    """Return the default statistics among the keys that were logged, monitors left out."""
    return tuple(key for key in DEFAULT_STATISTICS if key in keys and key not in monitors)


def _statistics(
    table: RunTable, patterns: Sequence[str] | None, monitors: Sequence[str]
) -> tuple[str, ...]:
    keys = [key for key in table.keys() if key not in monitors]  # noqa: SIM118 - not a dict
    if patterns is None:
        if found := logged_statistics(keys, monitors):
            return found
        known = ", ".join(keys[:8]) or "nothing"
        raise ValueError(
            "None of the runs logged a statistic of the Hessian or of gradients. Train with "
            f"HessianSpectrumCallback, or name statistics by hand; logged: {known}."
        )
    chosen: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter(keys, pattern)
        if not matching:
            table.require(pattern, argument="statistics")
            raise ValueError(f"{pattern!r} is a monitor already; a statistic is something else.")
        chosen += matching
    return tuple(dict.fromkeys(chosen))

"""`lightning-hessian report`: which statistic goes with the validation loss, over runs."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning_hessian.cli.arguments import (
    a_path,
    a_text,
    entity_and_project,
    named_values,
    read_as,
)
from lightning_hessian.results.arguments import live_interval, num_workers, row_choice
from lightning_hessian.results.escaping import visible
from lightning_hessian.results.output import check_file, check_folder

SUMMARY = "say which statistic goes with the validation loss, over one run or many"
DESCRIPTION = """\
Reads runs and correlates the statistics of the Hessian (and of gradients) with the metrics that
are monitored: within each run, allowing for the dependence of its measurements, and across runs
with one point each. Writes report.html, report.md, correlations.csv and correlations.json.

RUN is a W&B path (ENTITY/PROJECT, ENTITY/PROJECT/RUN or an address from the browser), an offline
W&B run folder, a folder of Lightning's CSVLogger, a folder of TensorBoard event files, MLflow's
mlruns or a run in it, or a folder with many of these below it. What `measure --follow` measured
beside a run is joined to it by step where both are named.

examples:
  lightning-hessian report wandb/offline-run-20260101_120000-abc
  lightning-hessian report logs/version_0 spectra_of_version_0
  lightning-hessian report --live wandb/offline-run-20260101_120000-abc spectra_of_abc
  lightning-hessian report --live logs/
  lightning-hessian report logs/ --monitor val_loss --monitor val_acc --out report
  lightning-hessian report ada/digits --filter config.optimizer=adam --group width
  lightning-hessian report sweep_output --group learning_rate --size num_parameters --at best
"""

OUTPUT = ("report.html", "report.md", "correlations.csv", "correlations.json")
"""The files that the command writes."""

_NO_FILTER = "--filter {}: write KEY=VALUE, for example state=finished."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    many: dict[str, Any] = {"action": "append", "type": a_text}
    key: dict[str, Any] = {"type": a_text, "metavar": "CONFIG_KEY"}
    add("runs", nargs="+", type=a_text, metavar="RUN", help="where a run, or many, can be read")
    text = "logged metric to correlate with; may be repeated; gap is the generalization gap "
    text += "(those that the callbacks had; else val_loss, and gap where it was logged)"
    add("--monitor", **many, metavar="KEY", help=text)
    text = "logged keys that are correlated with it; may be repeated (those of the callbacks); "
    text += "each one more makes the correction for their number stricter"
    add("--statistic", **many, metavar="GLOB", help=text)
    add("--out", type=a_path, default=Path("hessian_report"), help="folder (%(default)s)")
    text = "which measurement stands for a run across runs: the last, that with the best "
    text += "monitor, or the last one up to a step (%(default)s)"
    row = read_as(float, row_choice)
    add("--at", type=row, default="last", metavar="last|best|STEP", help=text)
    text = "whether the best monitor is the smallest or the largest (%(default)s)"
    add("--mode", choices=("min", "max"), default="min", help=text)
    text = "config key that colours and groups the runs, or none (the optimizer, where runs differ)"
    add("--group", **key, default="auto", help=text)
    text = "config key of the model's size, for scaling fits, or none (num_parameters, where runs "
    text += "have three or more)"
    add("--size", **key, default="auto", help=text)
    text = "of the runs of a W&B project: config.optimizer=adam, state=finished; may be repeated"
    add("--filter", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "also save it as a W&B Report there"
    add("--publish", type=entity_and_project, metavar="ENTITY/PROJECT", help=text)
    add("--no-cache", action="store_true", help="read every run again, keep nothing")
    text = "processes (one for each core)"
    add("--workers", type=read_as(int, num_workers), metavar="N", help=text)
    live = parser.add_argument_group("watching runs on this machine that are still training")
    live.add_argument("--live", action="store_true", help="write a page again as rows come in")
    seconds: dict[str, Any] = {"type": read_as(float, live_interval), "metavar": "SECONDS"}
    live.add_argument("--interval", **seconds, default=10.0, help="how often (%(default)g)")
    live.add_argument("--once", action="store_true", help="with --live: look once, then stop")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    monitors = list(dict.fromkeys(options.monitor)) if options.monitor else None
    if options.live:
        _follow(options, monitors)
        return
    check_folder(options.out, files=OUTPUT)
    from lightning_hessian.histories.load import RunLeftOutWarning, load_runs
    from lightning_hessian.reports.report import correlation_report, write_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunLeftOutWarning)  # told below
        table = load_runs(
            options.runs,
            filters=named_values(options.filter, _NO_FILTER),
            keys=[*(monitors or []), *(options.statistic or [])],
            cache=not options.no_cache,
            workers=options.workers,
        )
    for problem in table.problems[:5]:
        print(f"left out: {_line(problem)}", file=sys.stderr)
    if len(table.problems) > 5:
        print(f"and {len(table.problems) - 5} more, named in the report", file=sys.stderr)
    report = correlation_report(
        table,
        monitor=monitors,
        statistics=options.statistic,
        at=options.at,
        mode=options.mode,
        group=_none_or(options.group),
        size=_none_or(options.size),
        workers=options.workers,
    )
    page = write_report(report, options.out)
    print(_summary(report))
    print(f"\nReport: {page}  (also report.md, correlations.csv, correlations.json)")
    if options.publish:
        from lightning_hessian.reports.publish import publish

        print(f"W&B Report: {publish(report, options.publish)}")


def _none_or(key: str) -> str | None:
    return None if key == "none" else key


def _follow(options: argparse.Namespace, monitors: list[str] | None) -> None:
    from lightning_hessian.reports.live import follow

    folders = [Path(name) for name in options.runs]
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    if absent:
        raise ValueError(
            f"--live reads folders of runs on this machine, and {', '.join(absent)} is none."
        )
    page_file = options.out if options.out.suffix == ".html" else options.out / "live.html"
    check_file(page_file, "--out")
    page = follow(
        folders, options.out, monitor=monitors, interval=options.interval, once=options.once
    )
    print(f"Report: {page}")


def _summary(report: Any) -> str:
    """Return the answer in a few lines for the terminal."""
    from lightning_hessian.reports import verdicts
    from lightning_hessian.reports.verdicts import interval_text, judged, number, ranked

    across = bool(report.across)
    pairs = ranked(report.across) if across else ranked(report.within)
    title = "Across runs" if across else "Within runs, first differences"
    named = not across and len(report.table) > 1
    lines = [f"{title}: r, 95 % interval, p corrected by Holm, points"]
    for pair in pairs[:12]:
        r = pair.r if across else pair.r_differences
        ends = pair.fisher if across else (pair.differences.low, pair.differences.high)
        what = f"{pair.statistic} with {pair.monitor}" + (f", {pair.run}" if named else "")
        lines.append(
            f"  {what:<48} {number(r):>6}  {interval_text(ends):<16} {number(pair.holm, 3):>6}"
            f" {pair.num_points:>5}" + ("" if across else f"  {judged(pair).label}")
        )
    if not pairs:
        lines.append("  no run has two rows with a statistic and the monitor")
    if not across:
        lines.append(verdicts.answer_within(report.within))
    return "\n".join(map(_line, lines))


def _line(text: str) -> str:
    """Return one line that moves no cursor, whatever a run is called."""
    return visible(text.replace("\n", " ").replace("\r", " "))

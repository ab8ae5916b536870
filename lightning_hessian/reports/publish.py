"""A correlation report as a W&B Report, beside the runs that it is about."""

from __future__ import annotations

import math
from typing import Any

from lightning_hessian.reports.compose import compose
from lightning_hessian.reports.document import Document, to_markdown
from lightning_hessian.reports.figures import Drawing
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.verdicts import ranked

_PANELS = 4


def wandb_report(report: CorrelationReport, project: str) -> Any:
    """Return a W&B Report that is not saved yet; building it needs no server.

    Tables and words are those of report.md, as numbers at the time of writing; the scatter plots
    are W&B's own, live over the runs of the project.

    Args:
        report: What was found.
        project: Where the report goes, ``entity/project``.

    Raises:
        ValueError: ``project`` is not ``entity/project``.
        ModuleNotFoundError: wandb-workspaces is not installed.
    """
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise ValueError(f"--publish {project}: give ENTITY/PROJECT, where the report will stand.")
    try:
        import wandb_workspaces.reports.v2 as wr  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "W&B Reports are built by wandb-workspaces: pip install 'lightning-hessian[workspaces]'"
        ) from error
    document = compose(report)
    words = tuple(block for block in document.blocks if not isinstance(block, Drawing))
    text = to_markdown(Document(document.title, words)).partition("\n")[2].strip()
    group = report.settings.get("group")
    runset = wr.Runset(
        entity=entity, project=name, name="runs", groupby=[f"config.{group}"] if group else []
    )
    panels: list[Any] = [
        wr.ScatterPlot(
            title=f"{pair.monitor} against {pair.statistic}",
            x=wr.SummaryMetric(pair.statistic),
            y=wr.SummaryMetric(pair.monitor),
        )
        for pair in ranked(report.across)[:_PANELS]
        if not math.isnan(pair.r)
    ] or [
        wr.LinePlot(title=f"{pair.statistic} and {pair.monitor}", y=[pair.statistic, pair.monitor])
        for pair in ranked(report.within)[:_PANELS]
    ]
    blocks: list[Any] = [wr.MarkdownBlock(text=text)]
    if panels:
        blocks.insert(0, wr.PanelGrid(runsets=[runset], panels=panels))
    return wr.Report(
        entity=entity,
        project=name,
        title=document.title,
        description="Written by lightning-hessian report.",
        blocks=blocks,
    )


def publish(report: CorrelationReport, project: str) -> str:
    """Save the W&B Report that `wandb_report` builds, and return its address.

    Raises:
        ValueError: ``project`` is not ``entity/project``, or may not be written to.
        ConnectionError: The server cannot be reached.
    """
    from lightning_hessian.histories.wandb_runs import WandbPath, explained

    built = wandb_report(report, project)
    try:
        built.save()
    except Exception as error:
        raise explained(error, WandbPath(project)) from error
    return str(built.url)

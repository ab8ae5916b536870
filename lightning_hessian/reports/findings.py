"""What a correlation report found, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hessian.histories.run_table import RunTable
from lightning_hessian.reports.across import (
    AcrossRuns,
    Points,
    Scaling,
)
from lightning_hessian.reports.within import OverRuns, WithinRun
from lightning_hessian.results.arguments import checked
from lightning_hessian.results.path_arguments import path_name


@dataclass(frozen=True, eq=False)
class CorrelationReport:
    """What goes with what, in numbers; `write` puts it into words, tables and figures.

    Attributes:
        table: The runs.
        statistics: Keys of statistics.
        monitors: Keys of monitored metrics.
        points: One point a run, empty where there are fewer than 4 runs.
        across: Pairs across runs.
        scaling: How quantities scale with size.
        within: Pairs within runs.
        over: Summaries over runs of ``within``.
        settings: What was asked for.
    """

    table: RunTable
    statistics: tuple[str, ...]
    monitors: tuple[str, ...]
    points: Points | None
    across: tuple[AcrossRuns, ...]
    scaling: tuple[Scaling, ...]
    within: tuple[WithinRun, ...]
    over: tuple[OverRuns, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @checked({"out": path_name})
    def write(self, out: str | PathLike[str]) -> Path:
        """Write report.html, report.md with its figures, correlations.csv and .json.

        Args:
            out: Folder; made if missing.

        Returns:
            The path of report.html.

        Raises:
            ArgumentError: Nothing can be written to ``out``; found before anything is drawn.
        """
        from lightning_hessian.reports.compose import compose
        from lightning_hessian.reports.document import to_html, to_markdown
        from lightning_hessian.reports.numbers import write_csv, write_json
        from lightning_hessian.results.output import check_folder

        folder = Path(out)
        check_folder(folder, "out")
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        document = compose(self)
        for drawing in document.drawings:
            file = folder / "figures" / f"{drawing.name}.svg"
            file.write_text(drawing.standalone, encoding="utf-8", errors="replace")
        (folder / "report.md").write_text(to_markdown(document), encoding="utf-8", errors="replace")
        write_csv(self, folder / "correlations.csv")
        write_json(self, folder / "correlations.json")
        page = folder / "report.html"
        page.write_text(to_html(document), encoding="utf-8", errors="replace")
        return page

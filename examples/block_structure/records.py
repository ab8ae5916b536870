"""What an experiment leaves behind: numbers with their setting, figures, and lines to read."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import lightning_hessian
from lightning_hessian.tracking.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Attributes:
        numbers: What goes to the JSON file.
        figures: Each by what is added to the name of the experiment.
        lines: A table to print.
    """

    numbers: dict[str, Any]
    figures: dict[str, Figure]
    lines: list[str] = field(default_factory=list)


def save(
    name: str, settings: Any, outcome: Outcome, cpu_seconds: float, out: Path, figures: Path
) -> list[Path]:
    """Write the numbers of an experiment and its figures; return the files.

    Args:
        name: Of the experiment.
        settings: Its dataclass, which is written out beside the numbers.
        outcome: What it found.
        cpu_seconds: Seconds of one core that it took.
        out: Folder of ``<name>.json``.
        figures: Folder of the PNG files.
    """
    content = {
        "experiment": name,
        "settings": asdict(settings),
        "seed": settings.seed,
        "versions": {
            "lightning_hessian": lightning_hessian.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "cpu_seconds": round(cpu_seconds),
        **outcome.numbers,
    }
    files = [out / f"{name}.json"]
    for folder in (out, figures):
        folder.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps(rounded(content), indent=1) + "\n")
    for suffix, figure in outcome.figures.items():
        files.append(figures / f"{name}{suffix}.png")
        files[-1].write_bytes(render(figure, dpi=70))
    return files


def rounded(value: Any) -> Any:
    """Return the same with five digits for each number, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def as_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return rows of alike keys as lines in columns, numbers with four digits.

    Example:
        >>> for line in as_table([{"C": 10, "ratio": 0.123456}, {"C": 200, "ratio": 2e-5}]):
        ...     print(line)
          C   ratio
         10  0.1235
        200   2e-05
    """
    cells = [list(rows[0])]
    cells += [[_shown(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)

"""The walls of the house: which room imports what, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_hessian

PACKAGE = "lightning_hessian"
ROOT = Path(lightning_hessian.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

MEASURED = {"probe", "operators", "solvers", "statistics", "theory"}
MAY_IMPORT = {
    "probe": set(),
    "operators": {"probe"},
    "solvers": {"operators"},
    "statistics": set(),
    "theory": {"statistics"},
    "results": set(),
    "distributed": set(),
    "measure": MEASURED,
    "tracking": MEASURED,
    "reports": MEASURED | {"tracking"},
    "callbacks": MEASURED | {"measure", "tracking"},
    "metrics": {"statistics"},
}
"""Beside itself, ``results`` and ``distributed``; rooms that are not named import anything.

The front door has several leaves, ``measure`` and ``measure_<what>``.
"""

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
NUMPY_ONLY = LIGHTNING | {"torch", "torchmetrics", "wandb"}
FORBIDDEN = {
    "statistics": NUMPY_ONLY,
    "theory": NUMPY_ONLY,
    "solvers": LIGHTNING | {"wandb"},
    "operators": LIGHTNING | {"wandb"},
}
LATE = {"wandb", "matplotlib", "powerlaw"}


def _imports(source: str, module: str) -> Iterator[tuple[str, bool]]:
    """Yields (absolute name, whether it waits for a call) of every import.

    What only a type checker reads waits for ever.
    """
    tree = ast.parse(source)
    waiting = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    waiting += [
        child
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
        for child in n.body
    ]
    late = {n for part in waiting for n in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{origin}.{alias.name}", node in late) for alias in node.names)


def _room(module: str) -> str:
    name = module.split(".")[1] if "." in module else ""
    return "measure" if name.startswith("measure_") else name


def _breaches(source: str, module: str) -> list[str]:
    """Returns a sentence for every import of a module that goes through a wall."""
    room = _room(module)
    allowed = MAY_IMPORT.get(room, set()) | {room, "results", "distributed"}
    found = []
    for name, late in _imports(source, module):
        top = name.partition(".")[0]
        if top == PACKAGE and room in MAY_IMPORT and _room(name) not in allowed:
            found.append(f"{module} imports {name}, which lies to its right")
        if top in FORBIDDEN.get(room, ()):
            found.append(f"{module} imports {name}; {room} does without {top}")
        if top in LATE and not late:
            found.append(f"{module} imports {name} at its top; import it where it is used")
    return found


def _module(file: Path) -> str:
    return ".".join([PACKAGE, *file.relative_to(ROOT).with_suffix("").parts])


@pytest.mark.parametrize("file", FILES, ids=_module)
def test_walls(file: Path) -> None:
    assert _breaches(file.read_text(), _module(file)) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("statistics.power_law", "import torch"),
        ("statistics.power_law", "def f():\n    from torch import Tensor"),
        ("theory", "from lightning.pytorch import Trainer"),
        ("solvers.lanczos", "import pytorch_lightning as pl"),
        ("solvers.lanczos", "from lightning_hessian.statistics.power_law import fit_power_law"),
        ("solvers.lanczos", "from lightning_hessian.probe import objective"),
        ("solvers.lanczos", "from ..statistics import power_law"),
        ("solvers.lanczos", "from .. import measure"),
        ("operators.hessian", "import lightning"),
        ("operators.hessian", "from lightning_hessian.solvers import lanczos"),
        ("probe.objective", "from lightning_hessian import measure"),
        ("probe.objective", "import lightning_hessian"),
        ("statistics.subspace", "from lightning_hessian.solvers.lanczos import lanczos"),
        ("measure", "from lightning_hessian.tracking.history import History"),
        ("tracking.history", "from lightning_hessian.reports import offline_run"),
        ("tracking.scalars", "from lightning_hessian.measure.spectrum import hessian_spectrum"),
        ("reports.offline_run", "from lightning_hessian.callbacks import schedule"),
        ("results", "from lightning_hessian.probe.parameters import ParameterSpace"),
        ("callbacks.schedule", "from lightning_hessian.cli.main import main"),
        ("cli", "import wandb"),
        ("tracking.figures", "from matplotlib import pyplot"),
        ("tracking.figures", "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib"),
        ("statistics.power_law", "try:\n    import powerlaw\nexcept ImportError:\n    pass"),
    ],
)
def test_a_hole_in_a_wall_is_found(room: str, source: str) -> None:
    assert len(_breaches(source, f"{PACKAGE}.{room}")) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        (
            "solvers.lanczos",
            "from .basis import KrylovBasis\nfrom ..results import HessianSpectrum",
        ),
        (
            "callbacks.hessian_spectrum",
            "from lightning_hessian.measure.spectrum import hessian_spectrum",
        ),
        ("tracking.figures", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("cli", "def main():\n    import wandb\n    from lightning_hessian.reports import x"),
    ],
)
def test_a_door_is_no_hole(room: str, source: str) -> None:
    assert _breaches(source, f"{PACKAGE}.{room}") == []


def test_every_room_has_its_walls() -> None:
    rooms = {_room(_module(file)) for file in FILES}
    assert rooms - {"__init__", "cli", "commands", "demo"} <= MAY_IMPORT.keys()


def _imported_by(name: str, after: str) -> set[str]:
    """The top-level packages that ``import name`` brings in a fresh process beyond ``after``."""
    code = (
        f"import sys, {after}; before = set(sys.modules); import {name}; "
        "print(*{module.partition('.')[0] for module in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stdout.split())


def test_the_import_is_light() -> None:
    beyond = _imported_by(PACKAGE, after="lightning")
    assert PACKAGE in beyond
    assert not beyond & LATE

"""The walls of the house: which room imports what, that no files go in circles, what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import lightning_hessian

PACKAGE = "lightning_hessian"
ROOT = Path(lightning_hessian.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

GROUND = {"linear", "results"}
MAY_IMPORT: dict[str, set[str]] = {
    "results": set(),
    "linear": {"results"},
    "statistics": {"results"},
    # The left tower makes a measurement.
    "solvers": GROUND,
    "isolation": GROUND,
    "losses": GROUND,
    "probe": GROUND | {"isolation"},
    "operators": GROUND | {"isolation", "losses", "probe"},
    # The right tower reads it back.
    "tracking": GROUND | {"statistics"},
    "histories": {"results", "tracking"},
    "reports": {"results", "statistics", "tracking", "histories"},
    # Records know their scalars and drawings through tracking.
    "measure": GROUND | {"statistics", "tracking", "solvers", "isolation", "probe", "operators"},
    # The bridge, and the roof, which stands on everything.
    "callbacks": GROUND
    | {"statistics", "tracking", "solvers", "isolation", "probe", "operators", "measure"},
}
"""A room is a folder; what it may import beside itself, all of which lies below it."""
ROOF = "cli"
MAY_IMPORT[ROOF] = set(MAY_IMPORT)

MOST_ROOMS, MOST_FLOORS, LARGEST_SHARE = 15, 9, 0.13

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
NUMPY_ONLY = LIGHTNING | {"torch", "torchmetrics", "wandb"}
FORBIDDEN = {
    "statistics": NUMPY_ONLY,
    **dict.fromkeys(
        ("results", "linear", "solvers", "losses", "operators", "measure", "reports"),
        LIGHTNING | {"wandb"},
    ),
    # These know what a LightningModule is.
    "isolation": {"wandb"},
    "probe": {"wandb"},
    "histories": LIGHTNING,
}
LATE = {"wandb", "matplotlib", "powerlaw"}


# What the files say -----------------------------------------------------------------------------


def _module(file: Path) -> str:
    parts = [PACKAGE, *file.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """Returns the folder that a module lies in; nothing for the package itself."""
    return module.split(".")[1] if "." in module else ""


SOURCES = {_module(file): file.read_text() for file in FILES}
ROOMS = {_room(module) for module in SOURCES} - {""}


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


def _file_of(name: str, sources: Mapping[str, str]) -> str | None:
    """Returns the module that an imported name lies in, None outside the package."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name or None


def _graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns which file imports which, whenever and for whatever it does."""
    graph = {}
    for module, source in sources.items():
        found = {_file_of(name, sources) for name, _ in _imports(source, module)}
        graph[module] = {name for name in found if name} - {module}
    return graph


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns files that import one another in a circle, empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    for module in graph:
        if found := visit(module):
            return found
    return []


def _breaches(source: str, module: str) -> list[str]:
    """Returns a sentence for every import of a module that goes through a wall."""
    room = _room(module)
    found = []
    for name, late in _imports(source, module):
        top = name.partition(".")[0]
        inside = top == PACKAGE and room
        if inside and name == f"{PACKAGE}.__version__":
            inside = False
        if inside and room and _room(name) not in MAY_IMPORT[room] | {room}:
            found.append(f"{module} imports {name}, which does not lie below it")
        if top in FORBIDDEN.get(room, ()):
            found.append(f"{module} imports {name}; {room} does without {top}")
        if top in LATE and not late:
            found.append(f"{module} imports {name} at its top; import it where it is used")
    return found


# Walls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_walls(module: str) -> None:
    assert _breaches(SOURCES[module], module) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("statistics.power_law", "import torch"),
        ("statistics.power_law", "def f():\n    from torch import Tensor"),
        ("statistics.theory", "from lightning.pytorch import Trainer"),
        ("statistics.subspace", "from lightning_hessian.solvers.lanczos import lanczos"),
        ("solvers.lanczos", "import pytorch_lightning as pl"),
        ("solvers.lanczos", "from lightning_hessian.statistics.power_law import fit_power_law"),
        ("solvers.lanczos", "from lightning_hessian.probe import objective"),
        ("solvers.lanczos", "from lightning_hessian.operators.hessian import HessianOperator"),
        ("solvers.lanczos", "from ..statistics import power_law"),
        ("solvers.lanczos", "from .. import measure"),
        ("linear.operator", "from lightning_hessian.solvers.basis import KrylovBasis"),
        ("isolation.context", "from lightning_hessian.probe.objective import Objective"),
        ("operators.hessian", "import lightning"),
        ("operators.hessian", "from lightning_hessian.solvers import lanczos"),
        (
            "operators.batched",
            "if TYPE_CHECKING:\n    from lightning_hessian.measure.session import Session",
        ),
        ("probe.objective", "from lightning_hessian import measure"),
        ("probe.objective", "import lightning_hessian"),
        ("probe.sharding.fsdp1", "from lightning_hessian.operators.hessian import HessianOperator"),
        ("measure.spectrum", "from lightning_hessian.histories.load import load_runs"),
        ("measure.spectrum", "from lightning import Trainer"),
        ("tracking.scalars", "from lightning_hessian.probe.partition import Blocks"),
        ("tracking.scalars", "from lightning_hessian.measure.spectrum import hessian_spectrum"),
        ("tracking.history", "from lightning_hessian.histories import offline_run"),
        ("histories.load", "from lightning_hessian.reports import within"),
        ("reports.live", "from lightning_hessian.callbacks import schedule"),
        ("results", "from lightning_hessian.probe.parameters import ParameterSpace"),
        ("callbacks.schedule", "from lightning_hessian.cli.main import main"),
        ("callbacks.schedule", "from lightning_hessian.histories.load import load_runs"),
        ("cli.main", "import wandb"),
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
        ("measure.spectrum", "from lightning_hessian.tracking.scalars import spectrum_scalars"),
        ("tracking.figures", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("cli.main", "def main():\n    import wandb\n    from lightning_hessian.reports import x"),
        ("cli.main", "def main():\n    from lightning_hessian import __version__"),
    ],
)
def test_a_door_is_no_hole(room: str, source: str) -> None:
    assert _breaches(source, f"{PACKAGE}.{room}") == []


BY_NAME = {("results.shown", "tracking.views")}
"""Modules of other rooms that are looked up by a text, which goes around the walls."""


def _named(source: str) -> set[str]:
    """Returns the modules of the package that texts of a file name in full."""
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and text in SOURCES} - {PACKAGE}


def test_only_known_doors_are_opened_by_name() -> None:
    """Records ask for their pictures so, which are drawn above them (`results.shown`)."""
    found = {
        (module, named)
        for module, source in SOURCES.items()
        for named in _named(source)
        if _room(named) != _room(module)
    }
    assert found == {(f"{PACKAGE}.{one}", f"{PACKAGE}.{other}") for one, other in BY_NAME}


def test_every_room_has_its_walls() -> None:
    assert MAY_IMPORT.keys() == ROOMS


def test_rooms_are_folders_and_few() -> None:
    loose = [file.name for file in ROOT.glob("*.py") if file.name != "__init__.py"]
    assert loose == []
    assert len(ROOMS) <= MOST_ROOMS


def test_arrows_go_down_only_and_the_floors_are_few() -> None:
    floors: dict[str, int] = {}
    while len(floors) < len(MAY_IMPORT):
        standing = {
            room: 1 + max((floors[below] for below in allowed), default=0)
            for room, allowed in MAY_IMPORT.items()
            if room not in floors and allowed - {room} <= floors.keys()
        }
        assert standing, f"these allow one another: {MAY_IMPORT.keys() - floors.keys()}"
        floors |= standing
    assert max(floors.values()) <= MOST_FLOORS


def test_no_arrow_is_allowed_that_nobody_goes() -> None:
    """A wall that could stand does stand; the roof and the bridge may reach everything below."""
    gone: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, others in _graph(SOURCES).items():
        if room := _room(module):
            gone[room] |= {_room(other) for other in others} - {"", room}
    for room in ROOMS - {ROOF, "callbacks"}:
        assert MAY_IMPORT[room] - {room} == gone[room], room


def test_no_files_import_one_another_in_a_circle() -> None:
    """Imports that wait, or are for type checkers only, count: they are as hard to read."""
    assert _circle(_graph(SOURCES)) == []


@pytest.mark.parametrize(
    "first",
    [
        f"from {PACKAGE}.b import x",
        f"def f():\n    from {PACKAGE}.b import x",
        f"if TYPE_CHECKING:\n    from {PACKAGE} import b",
        "from . import b",
    ],
)
def test_a_circle_is_found(first: str) -> None:
    sources = {f"{PACKAGE}.a": first, f"{PACKAGE}.b": "from .c import y"}
    assert _circle(_graph({**sources, f"{PACKAGE}.c": "import torch"})) == []
    circle = _circle(_graph({**sources, f"{PACKAGE}.c": f"import {PACKAGE}.a"}))
    assert {name.rpartition(".")[2] for name in circle} == {"a", "b", "c"}


def test_no_room_is_too_large() -> None:
    lines = Counter[str]()
    for module, source in SOURCES.items():
        lines[_room(module)] += source.count("\n")
    shares = {room: count / lines.total() for room, count in lines.items()}
    assert {room: share for room, share in shares.items() if share > LARGEST_SHARE} == {}


# What an import costs ---------------------------------------------------------------------------


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

"""Make rows of the papers' tables again, and keep what came out.

    python examples/papers/run.py --data-dir DATA                      # what fits an hour
    python examples/papers/run.py --data-dir DATA --rows 'hpl-7-*' --seeds 3 --device cuda

Rows of one network are one process, which trains it once. A row whose result is there, of the same
settings, is not repeated: a run that is stopped goes on where it was. Nor is one that differs from
a row that is there in what is printed alone. The cheapest come first.
Without ``--rows`` those marked for a GPU are left out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import hpl
import sg
from cost import expected_minutes
from rows import Network, Row

ROWS: list[Row] = [*hpl.ROWS, *sg.ROWS]
RESULTS = Path(__file__).parent / "results"
SKIPPED = 3  # what a process says by its exit status


def chosen(rows: Sequence[Row], patterns: Sequence[str], *, gpu: bool) -> list[Row]:
    """Return the rows that the patterns name; without patterns all that the machine can make.

    Raises:
        SystemExit: A pattern names no row.
    """
    for pattern in patterns:
        if not any(fnmatch(row.id, pattern) for row in rows):
            raise SystemExit(f"no row is called {pattern!r}; --list shows them all")
    if not patterns:
        return [row for row in rows if gpu or not row.gpu]
    return [row for row in rows if any(fnmatch(row.id, pattern) for pattern in patterns)]


def result_file(row: Row, settings: str, folder: Path = RESULTS) -> Path:
    """Return where the result of a row under some settings is kept."""
    return folder / row.id / f"{settings}.json"


def is_made(row: Row, settings: str, folder: Path = RESULTS) -> bool:
    """Return whether there is a result of the row as it is defined now."""
    path = result_file(row, settings, folder)
    return path.exists() and json.loads(path.read_text())["definition"] == row.definition


def save(row: Row, settings: Any, found: dict[str, Any], folder: Path) -> None:
    """Write the result of a row, whole or not at all."""
    content = {"row": row.id, "definition": row.definition, "seed": settings.seed,
               "settings": settings.name, "date": date.today().isoformat(), **found}  # fmt: skip
    _write(result_file(row, settings.name, folder), content)


def take_over(row: Row, settings: str, folder: Path) -> bool:
    """Take over the result of a row that is the same in all but what is printed; whether one is."""
    for other in ROWS:
        if other.definition == row.definition and is_made(other, settings, folder):
            content = json.loads(result_file(other, settings, folder).read_text())
            _write(result_file(row, settings, folder), {**content, "row": row.id})
            return True
    return False


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_rounded(content), indent=1) + "\n")
    os.replace(part, path)


def _rounded(value: Any) -> Any:
    """Return the same with six digits for each number, NaN as None."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value


def work(options: argparse.Namespace) -> int:
    """Make the rows of one network in this process."""
    from data import MissingDataError
    from measure import Settings, measure_rows
    from recipes import MissingPackageError

    settings = Settings(options.seed, options.device, options.precision, options.probe)
    rows = [row for row in ROWS if row.id in options.work]
    try:
        measure_rows(
            rows, settings, options.data_dir, options.work_dir / "networks",
            lambda row, found: save(row, settings, found, options.results),
        )  # fmt: skip
    except (MissingDataError, MissingPackageError) as missing:
        print(f"skipped: {missing}")
        return SKIPPED
    return 0


class Runner:
    """Makes pending rows, network by network, each in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.monotonic()
        self.lock = threading.Lock()
        self.counts = {"made": 0, "skipped": 0, "failed": 0, "left": 0}

    def pending(self, rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
        """Return seeds with the rows of one network that have no result, the cheapest first."""
        groups: dict[tuple[int, Network], list[Row]] = {}
        for seed in range(self.options.seeds):
            for row in rows:
                of = (row, self._name(seed), self.options.results)
                if not (is_made(*of) or take_over(*of)):
                    groups.setdefault((seed, row.network), []).append(row)
        found = [(seed, group) for (seed, _), group in groups.items()]
        return sorted(found, key=lambda item: (item[0], expected_minutes(item[1])))

    def run(self, rows: Sequence[Row]) -> None:
        """Make all that is pending, within the budget."""
        pending = self.pending(rows)
        done = len(rows) * self.options.seeds - sum(len(group) for _, group in pending)
        print(f"{done} results are there; {len(pending)} networks to go", flush=True)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            for number, (seed, group) in enumerate(pending, 1):
                pool.submit(self._make, f"[{number}/{len(pending)}]", seed, group)
        print(", ".join(f"{count} {what}" for what, count in self.counts.items()))

    def _make(self, label: str, seed: int, group: list[Row]) -> None:
        names = ", ".join(row.id for row in group)
        begun = time.monotonic()
        budget = self.options.budget_minutes
        if budget is not None and begun - self.begun > 60 * budget:
            self._count("left", len(group))
            return
        environment = {"OMP_NUM_THREADS": str(self.options.threads), **os.environ}
        done = subprocess.run(
            self._command(seed, group), env=environment, capture_output=True, text=True, check=False
        )
        made = sum(is_made(row, self._name(seed), self.options.results) for row in group)
        self._count("made", made)
        rest = len(group) - made
        if rest:
            self._count("skipped" if done.returncode == SKIPPED else "failed", rest)
        lines = (done.stdout if done.returncode == SKIPPED else done.stderr).strip().splitlines()
        said = f"; {lines[-1]}" if rest and lines else ""
        took = time.monotonic() - begun
        print(f"{label} {names}, seed {seed}: {made} made in {took:.0f} s{said}", flush=True)

    def _command(self, seed: int, group: list[Row]) -> list[str]:
        options = self.options
        command = [
            sys.executable, str(Path(__file__).resolve()), "--data-dir", str(options.data_dir),
            "--results", str(options.results), "--work-dir", str(options.work_dir),
            "--device", options.device, "--seed", str(seed), "--work", *(row.id for row in group),
        ]  # fmt: skip
        for name in ("precision", "probe"):
            value = getattr(options, name)
            if value is not None:
                command += [f"--{name}", str(value)]
        return command

    def _name(self, seed: int) -> str:
        from measure import Settings

        return Settings(seed, self.options.device, self.options.precision, self.options.probe).name

    def _count(self, what: str, number: int) -> None:
        with self.lock:
            self.counts[what] += number


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose rows, and make them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-dir", type=Path, help="holds the data sets; data.py says under which names")
    add("--rows", action="extend", nargs="*", default=[], help="patterns such as 'hpl-7-*'")
    add("--seeds", type=int, default=1, help="seeds 0, 1, ... of each row (%(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--precision", choices=("float32", "float64"),
        help="of the measurement; by default that of the training")  # fmt: skip
    add("--probe", type=int, help="samples of the Hessian, in the place of the rows' own")
    add("--jobs", type=int, default=1, help="networks at a time (%(default)s)")
    add("--threads", type=int, default=1, help="of each process (%(default)s)")
    add("--budget-minutes", type=float, help="no further network is begun after so many")
    add("--list", action="store_true", help="show rows and about how long they take, and stop")
    add("--results", type=Path, default=RESULTS, help="(%(default)s)")
    add("--work-dir", type=Path, default=Path("papers_output"), help="trained networks")
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    add("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = chosen(ROWS, options.rows, gpu=options.device == "cuda")
    if options.list:
        for row in sorted(rows, key=lambda row: expected_minutes([row])):
            mark = "  GPU" if row.gpu else ""
            print(f"{row.id:<40}{row.label:<45}{expected_minutes([row]):>8.0f} min{mark}")
        return 0
    if options.data_dir is None:
        parser.error("give --data-dir")
    if options.work:
        return work(options)
    Runner(options).run(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Check on a card that all paths run, and give what the CPU gives in float64.

    python tools/gpu_check.py [--device cuda|cpu] [--quick] [--only TEXT] [--json FILE]

Nothing needs to be installed but torch and what a check names: it is skipped where that is
missing. The verdict is the exit status: 0 where nothing failed. It ends within six minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; see torch's docs

import torch  # noqa: E402 - what is set above is read when it is imported
from gpu.running import Check, Settings, environment, run  # noqa: E402

BUDGET = 345.0
"""Seconds after which nothing is begun, and nothing goes on."""


def gathered() -> list[Check]:
    """Return all checks; a module whose packages are missing has one, which says so."""
    found: list[Check] = []
    for name in ("spectra", "fits", "ranks"):
        try:
            module = __import__(f"gpu.{name}", fromlist=["checks"])
        except ModuleNotFoundError as error:
            found.append(Check(f"all of {name}", _missing(error)))
        else:
            found += module.checks()
    return found


def _missing(error: ModuleNotFoundError) -> Callable[[Settings], str]:
    def work(settings: Settings) -> str:
        raise error

    return work


def main() -> int:
    """Run the checks; return 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(a card where there is one)")
    parser.add_argument("--quick", action="store_true", help="one network instead of all")
    parser.add_argument("--only", metavar="TEXT", help="checks whose names hold this")
    parser.add_argument("--list", action="store_true", help="the names, and nothing else")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record goes")
    options = parser.parse_args()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and here != "cuda":
        parser.error("this machine has no card that torch can use; give --device cpu")
    device = torch.device("cuda", 0) if (options.device or here) == "cuda" else torch.device("cpu")
    checks = [one for one in gathered() if not options.only or options.only in one.name]
    if options.list:
        print("\n".join(one.name for one in checks))
        return 0
    if not checks:
        parser.error(f"--only {options.only!r} is part of no name; --list shows them")
    settings = Settings(device, options.quick)
    for key, value in environment(device).items():
        print(f"{key}: {value}")
    if not settings.is_card:
        print("Not run on a card: this shows that the checks run, and nothing about a GPU.")
    outcomes = run(checks, settings, options.budget, options.json)
    counts = {v: sum(o.verdict == v for o in outcomes) for v in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["failed"] or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())

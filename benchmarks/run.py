"""`make bench`: every quantity of the target table, in one run, as Markdown and JSON.

    python benchmarks/run.py --data-dir DATA [--only hvp-lenet --only top-10] [--out bench_output]

DATA holds ``MNIST/raw`` and ``tinyshakespeare/input.txt``; what is missing is skipped by name.
``--synthetic`` measures stand-ins instead, whose eigenvalues mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if "--threads" in sys.argv:  # before NumPy and torch start theirs
    _COUNT = sys.argv[sys.argv.index("--threads") + 1]
    os.environ |= {f"{library}_NUM_THREADS": _COUNT for library in ("OMP", "OPENBLAS", "MKL")}

import torch
from problems import MissingDataError
from quantities import PIECES, Finding
from timing import CLOCKS, use_clock

PACKAGES = (
    "lightning-hessian", "torch", "numpy", "scipy", "PyHessian", "hessian-eigenthings",
    "curvlinops-for-pytorch",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "")


def markdown(found: dict[str, Any]) -> str:
    """Return the target table and the tables beside it."""
    parts = ["| quantity | here | target | reached |", "|---|---|---|---|"]
    pieces = {name: found["pieces"][name] for name in PIECES if name in found["pieces"]}
    for piece in pieces.values():
        for row in piece["rows"]:
            note = f" ({row['note']})" if row["note"] else ""
            sign = ">=" if row["at_least"] else "<="
            target = "" if row["target"] is None else f"{sign} {row['target']:g}"
            reached = {None: "", True: "yes", False: "**no**"}[row["met"]]
            parts.append(f"| {row['quantity']} | {row['value']:.3g}{note} | {target} | {reached} |")
    tables: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        _, title, head = PIECES[name]
        if piece["tables"]:
            tables.setdefault(title, head.split("\n")).extend(piece["tables"])
    for title, lines in tables.items():
        parts += ["", f"{title}:", "", *lines]
    settings = found["environment"]
    packages = ", ".join(f"{n} {v}" for n, v in settings["packages"].items() if v)
    parts += [
        "",
        f"{settings['processor']}, {settings['cores']} cores, {settings['threads']} threads; "
        f"Python {settings['python']}, {packages}. "
        + ("Synthetic data. " if found["synthetic"] else "")
        + ("Times are processor times. " if found["clock"] == "cpu" else "")
        + f"Load average before the pieces: {_loads(pieces)}.",
    ]
    return "\n".join(parts) + "\n"


def _loads(pieces: dict[str, Any]) -> str:
    loads = [piece["load"] for piece in pieces.values()]
    return f"{min(loads):.1f} to {max(loads):.1f}"


def as_record(finding: Finding, load: float, seconds: float) -> dict[str, Any]:
    """Return a finding as it goes into the JSON."""
    rows = [{**asdict(row), "met": row.met} for row in finding.rows]
    return {
        "rows": rows,
        "tables": finding.tables,
        "numbers": finding.numbers,
        "load": load,
        "seconds": seconds,
    }


def main() -> int:
    """Run the pieces that were asked for; those of before stay in the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, help="holds MNIST/raw and tinyshakespeare")
    parser.add_argument("--synthetic", action="store_true", help="stand-ins instead of data")
    parser.add_argument("--only", action="append", choices=PIECES, help="may be repeated")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), help="(%(default)s)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu, with --threads 1, where other programs run too (%(default)s)",
    )
    options = parser.parse_args()
    if options.data_dir is None and not options.synthetic:
        parser.error("give --data-dir DATA, or --synthetic for machines without the data sets")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu is right for --threads 1 only: it adds up the threads")
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    found: dict[str, Any] = {"pieces": {}}
    if options.only and path.exists():
        found = json.loads(path.read_text())
    found |= {"environment": environment(), "synthetic": options.synthetic, "clock": options.clock}
    missing = False
    for name in options.only or PIECES:
        load, start = os.getloadavg()[0], time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            finding = PIECES[name][0](None if options.synthetic else options.data_dir)
        except MissingDataError as error:
            print(f"skipped: {name}, {error}", flush=True)
            missing = True
            continue
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        found["pieces"][name] = as_record(finding, load, seconds)
        path.write_text(json.dumps(found, indent=1))
        (options.out / "table.md").write_text(markdown(found))
    print(markdown(found) if found["pieces"] else "nothing was measured")
    return 1 if missing and not found["pieces"] else 0


if __name__ == "__main__":
    sys.exit(main())

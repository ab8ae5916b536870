"""Measure speed and memory on a card, piece by piece.

    python tools/gpu_bench.py [--device cuda|cpu] [--small] [--only PIECE] [--out FOLDER]

Each piece takes nine minutes at most and leaves FOLDER/PIECE.json; what it had measured when its
time was up is kept. Called again, it goes on with the pieces that are missing. FOLDER/table.md has
all that was found.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("", "tests", "tools", "benchmarks")]

import torch  # noqa: E402 - the paths above come first
from gpu.measuring import forget  # noqa: E402
from gpu.pieces import PIECES, Bench  # noqa: E402
from gpu.running import environment, limited, said  # noqa: E402
from gpu.tables import markdown  # noqa: E402

LIMIT = 540.0


def ran(name: str, bench: Bench, file: Path, limit: float) -> dict[str, Any]:
    """Run a piece, and return its record; what there is of it is in the file at any time."""
    start = time.perf_counter()
    frame = {"piece": name, "small": bench.small, "environment": environment(bench.device)}

    def keep(found: dict[str, Any], state: str = "unfinished") -> dict[str, Any]:
        seconds = time.perf_counter() - start
        record = {**frame, "state": state, "seconds": seconds, "found": found}
        file.write_text(json.dumps(record, indent=1) + "\n")
        return record

    latest: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        latest.update(found)
        keep(found)

    piece = Bench(bench.device, bench.small, note)
    try:
        with limited(limit):
            found = PIECES[name](piece)
    except Exception as error:  # noqa: BLE001 - the other pieces have their turn
        return keep(latest, said(error))
    # An engine may have taken the end of the time for an error of its own.
    late = time.perf_counter() - start > limit
    return keep(found, "the time was up" if late else "done")


def main() -> int:
    """Run the pieces that are missing; return 1 where one did not end well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(a card where there is one)")
    parser.add_argument("--small", action="store_true", help="small networks: it only has to run")
    parser.add_argument("--only", action="append", choices=PIECES, help="may be repeated")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a piece (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench_output/gpu"), help="(%(default)s)")
    options = parser.parse_args()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and here != "cuda":
        parser.error("this machine has no card that torch can use; give --device cpu --small")
    if (options.device or here) == "cpu" and not options.small:
        parser.error("on a CPU the networks take hours; give --small, which shows that all runs")
    device = torch.device("cuda", 0) if (options.device or here) == "cuda" else torch.device("cpu")
    if device.type == "cpu":  # a C++ compiler takes minutes for what has to be shown to run only
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for name in options.only or PIECES:
        file = options.out / f"{name}.json"
        record = json.loads(file.read_text()) if file.exists() else None
        kept = record is not None and record["state"] == "done" and record["small"] == options.small
        if record is None or not kept or options.again:
            forget(device)
            bench = Bench(device, options.small, lambda found: None)
            record = ran(name, bench, file, options.limit)
        print(f"{name}: {record['state']}, {record['seconds']:.0f} s", flush=True)
        records.append(record)
        (options.out / "table.md").write_text(markdown(records))
    print(markdown(records))
    return 0 if all(record["state"] == "done" for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())

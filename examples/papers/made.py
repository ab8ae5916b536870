"""Rows with their results, and what of them agrees with the paper."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Row

RESULTS = Path(__file__).parent / "results"
PROTOCOLS = {"hpl": ("converged", "pooled"), "sg": ("gradients",)}


@dataclass(frozen=True)
class Made:
    """A row with its results: those of the row's own settings by seed, and those of others.

    ``diverged`` says that training has ended in NaN; such results have no numbers, and are not
    among the others.
    """

    row: Row
    own: tuple[dict[str, Any], ...]
    others: tuple[dict[str, Any], ...]
    diverged: bool = False

    def values(self, protocol: str, name: str) -> list[float]:
        """Return a number of a protocol for all seeds that have it."""
        found = (result["numbers"].get(protocol, {}).get(name) for result in self.own)
        return [value for value in found if value is not None]

    def first(self, protocol: str) -> dict[str, Any]:
        """Return the numbers of a protocol at the first seed."""
        return self.own[0]["numbers"].get(protocol, {})


def read(rows: Sequence[Row], folder: Path = RESULTS) -> list[Made]:
    """Return all rows, with what results there are."""
    found = []
    for row in rows:
        results = [
            json.loads(path.read_text()) for path in sorted((folder / row.id).glob("*.json"))
        ]
        diverged = any(result.get("diverged", False) for result in results)
        results = [result for result in results if not result.get("diverged", False)]
        plain = [re.fullmatch(r"seed\d+", result["settings"]) is not None for result in results]
        own = [result for result, is_plain in zip(results, plain, strict=True) if is_plain]
        others = [result for result, is_plain in zip(results, plain, strict=True) if not is_plain]
        own.sort(key=lambda result: result["seed"])
        found.append(Made(row, tuple(own), tuple(others), diverged))
    return found


# What agrees -------------------------------------------------------------------------------------


def verdict(made: Made, protocol: str) -> bool | None:
    """Return whether ours is the paper's verdict, at the first seed; None where one has none."""
    found, printed = made.first(protocol), made.row.printed
    if found.get("power_law") is None:
        return None
    if printed.rate is not None and printed.gaussian_rate is not None:
        same_law = (float(printed.rate) > 50) == found["power_law"]
        return same_law and (float(printed.gaussian_rate) > 50) == (found["gaussian_rate"] > 0.5)
    return None if printed.verdict is None else (printed.verdict == "Yes") == found["power_law"]


def slope_agrees(made: Made, protocol: str) -> bool | None:
    """Return whether s lies within two standard errors of the paper's, both having one."""
    found, printed = made.first(protocol), made.row.printed
    if printed.s is None or found.get("s") is None:
        return None
    # The standard error of s is s / sqrt(K) to first order, as sigma is (beta - 1) / sqrt(K).
    theirs, ours = float(printed.s), found["s"]
    error = math.hypot(theirs / math.sqrt(made.row.measure.k), ours / math.sqrt(found["k"]))
    return abs(theirs - ours) <= 2 * error

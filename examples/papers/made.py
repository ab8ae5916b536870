"""Rows with their results, and what of them agrees with the paper."""

from __future__ import annotations

import json
import math
import re
import statistics
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


def is_at_chance(made: Made) -> bool:
    """Return whether a trained network is right less than twice as often as by guessing (seed 0).

    Its spectrum is not that of a minimum, whatever it looks like. Guessing takes each class as
    often: where one class is most of the test (Avila), such a network can be right more often.
    """
    accuracy = made.own[0]["about"].get("test_accuracy")
    if made.row.network.recipe is None or accuracy is None:
        return False
    return accuracy < 2 / made.row.network.data.num_classes


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


def slope_agrees(made: Made, protocol: str, seed: float = 0.0) -> bool | None:
    """Return whether s lies within two standard errors of the paper's, both having one.

    ``seed`` is what the seed alone moves a slope by (`seed_spread`), in theirs as in ours.
    """
    found, printed = made.first(protocol), made.row.printed
    if printed.s is None or found.get("s") is None:
        return None
    # The standard error of s is s / sqrt(K) to first order, as sigma is (beta - 1) / sqrt(K).
    theirs, ours = float(printed.s), found["s"]
    errors = (theirs * math.hypot(1 / math.sqrt(made.row.measure.k), seed),
              ours * math.hypot(1 / math.sqrt(found["k"]), seed))  # fmt: skip
    return abs(theirs - ours) <= 2 * math.hypot(*errors)


# What the seed does -------------------------------------------------------------------------------

STUDIED = 5
"""A row of as many seeds belongs to the study of what the seed alone does."""


def seed_spread(rows: Sequence[Made], protocol: str, name: str) -> float | None:
    """Return by what share of itself a number moves with the seed; None where nobody has looked.

    It is the standard deviation of the logarithm over the seeds of a row, and over the rows the
    root of the mean variance.
    """
    of_rows = [made.values(protocol, name) for made in rows]
    variances = [
        statistics.variance(map(math.log, values)) for values in of_rows if len(values) >= STUDIED
    ]
    return math.sqrt(statistics.fmean(variances)) if variances else None


def is_beyond_seed(made: Made, protocol: str, seed: float) -> bool:
    """Return whether d_ks is further from d_c than twice what the seed alone moves it by."""
    found = made.first(protocol)
    return abs(math.log(found["d_ks"] / found["d_c"])) > 2 * seed

"""Nonsense to give to every argument, and the list of what is none, with the reasons."""

from __future__ import annotations

import inspect
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OBJECT = object()
HUGE = [10**5000]
"""More digits than Python turns into a text."""

NONSENSE: dict[str, Any] = {
    "None": None,
    "'x'": "x",
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "True": True,
    "10**12": 10**12,
    "object()": OBJECT,
    "[]": [],
    "{}": {},
    "b'x'": b"x",
}

BOUND = "an upper bound, which may be as large as one likes"
NAME = "a name or path like any other; what is not there is said later"
REAL = "a real number like any other"
ALLOWED: dict[str, dict[str, str]] = {
    "monitor": {"'x'": "a metric that is not logged warns, or is refused with the nearest"},
    "products": {"10**12": BOUND},
    "seconds": {"10**12": BOUND, "0": "time is up at once"},
    "instruments": {"[]": "nothing besides"},
    "max_tested": {"10**12": BOUND},
    "memory": {"10**12": BOUND},
    "memory_budget": {"10**12": BOUND},
    "clip_norm": {"10**12": BOUND},
    "momentum": {"0": "the default"},
    "num_steps": {"10**12": "no more than there are parameters are taken"},
    "density_steps": {"10**12": "no more than there are parameters are taken"},
    "every_n_validations": {"10**12": "a validation that does not come in this run"},
    "figures": {"10**12": "a measurement that does not come in this run"},
    "n": {"10**12": "a validation that does not come in this run"},
    "unit": {"10**12": "the last block may be smaller"},
    "dim": {"-1": "the last dimension", "0": "the first dimension"},
    "parts": {"[]": "no parts", "'x'": "one part"},
    "sizes": {"[]": "equal parts"},
    "parameter": {"'x'": NAME},
    "block": {"'x'": NAME},
    "trace_probes": {"0": "no trace"},
    "num_eigenvectors": {"0": "none", "10**12": "no more than there are"},
    "seed": {"0": "the default"},
    "checkpoint": {"'x'": NAME},
    "cache": {"'x'": NAME},
    "keys": {"'x'": NAME, "[]": "none"},
    "filters": {"{}": "none"},
    "at": {"10**12": "the last row up to that step", "0": "that of step 0"},
    "x": {
        "-1": REAL,
        "0": REAL,
        "10**12": REAL,
        "nan": "no density there",
        "inf": REAL,
        "[]": "an empty grid",
    },
    "exponent": {"10**12": REAL, "-1": REAL, "0": REAL},
    "ks_distance": {"0": REAL},
    "gamma": {"10**12": REAL},
    "ratio": {"10**12": REAL},
    "variance": {"10**12": REAL},
    "beta": {"10**12": REAL},
    "slope": {"10**12": REAL},
    "trace": {"10**12": REAL},
    "cutoff": {"10**12": REAL},
    "perturbation": {"10**12": REAL},
    "lambda_1": {"10**12": REAL},
    "interval": {"10**12": BOUND},
    "out": {"'x'": NAME},
    "k": {"10**12": BOUND},
    "num_values": {"[]": "an empty grid"},
    "chunk_size": {"10**12": "no more than there are tokens"},
    "label_smoothing": {"0": "the default"},
    "ignore_index": {"-1": REAL, "0": REAL, "10**12": REAL},
}
"""By argument: nonsense that is none, and why. None is fine where it is the default, True and
False where the default is one of them."""

ONLY_IN: dict[tuple[str, str], dict[str, str]] = {
    ("gradient_structure", "num_eigenvalues"): {"10**12": "fewer where T - 1 or n is smaller"},
    ("GradientStructureCallback", "num_eigenvalues"): {"10**12": "as in the function"},
    ("layer_spectra", "num_eigenvalues"): {"10**12": "as many as a layer has parameters"},
    ("SpectrumInstrument", "num_eigenvalues"): {"10**12": "the model is not known yet"},
    ("SpectrumInstrument", "parameters"): {"'x'": "a name; the model is not known yet"},
    ("BlocksInstrument", "parameters"): {"'x'": "a name; the model is not known yet"},
    ("GradientStructureCallback", "batch_size"): {"10**12": "the data are not known yet"},
    ("GradientStructureCallback", "num_batches"): {},
    ("GradientsInstrument", "batch_size"): {"10**12": "the data are not known yet"},
    ("GradientsInstrument", "num_eigenvalues"): {"10**12": "as in the function"},
    ("GradientsInstrument", "parameters"): {"'x'": "a name; the model is not known yet"},
    ("LayersInstrument", "layers"): {},
    ("StabilityInstrument", "parameters"): {"'x'": "a name; the model is not known yet"},
    ("StabilityInstrument", "max_products"): {"10**12": BOUND},
    ("Preconditioner", "threshold"): {"inf": "a parameter that does not move", "10**12": REAL},
    ("Preconditioner", "weight_decay"): {"0": "the default", "10**12": REAL},
}  # fmt: skip


def is_fine(function: str, parameter: inspect.Parameter, label: str) -> bool:
    """Whether a value is sense for an argument after all, by the lists above."""
    if label == "None" and (parameter.default is None or "None" in str(parameter.annotation)):
        return True
    if label == "True" and isinstance(parameter.default, bool):
        return True
    if label == "True" and parameter.name in {"exact", "progress"}:  # a flag, or None
        return True
    fine = {**ALLOWED.get(parameter.name, {}), **ONLY_IN.get((function, parameter.name), {})}
    return label in fine


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A block that fails where it takes longer, instead of hanging."""

    def late(*_: Any) -> None:
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

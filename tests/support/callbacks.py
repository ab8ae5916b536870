"""A callback whose spectrum is measured as a test wants it."""

from __future__ import annotations

from typing import Any

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.measure.spectrum import SpectrumInstrument

_SHARED = ("num_eigenvalues", "parameters", "protocol", "tol", "basis", "significance")
"""What the spectrum has of the callback's arguments."""


def with_spectrum(
    kind: type[HessianSpectrumCallback] = HessianSpectrumCallback,
    *,
    trace_probes: int = 2,
    density: bool = False,
    **arguments: Any,
) -> Any:
    """Return a callback with another number of probes for the trace, or with a density.

    Args:
        kind: Of the callback.
        trace_probes: Of the spectrum.
        density: Of the spectrum.
        **arguments: Of the callback, which measures whenever it is due unless they bound it; an
            instrument "spectrum" among them is taken as it is.
    """
    instruments = list(arguments.pop("instruments", ()))
    if not any(instrument.name == "spectrum" for instrument in instruments):
        shared = {name: arguments[name] for name in _SHARED if name in arguments}
        instruments.append(SpectrumInstrument(trace_probes=trace_probes, density=density, **shared))
    return kind(instruments=instruments, **{"time_budget": None, **arguments})

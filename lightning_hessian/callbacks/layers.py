"""What the callback logs of layers: the statistics of each under a key of its own."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_hessian.measure.layers import Layers, layer_groups, layer_spectra
from lightning_hessian.results import HessianSpectrum
from lightning_hessian.tracking.scalars import spectrum_scalars


def layer_scalars(
    module: Any,
    loss_fn: Any,
    batches: Any,
    layers: Layers,
    significance: float,
    **options: Any,
) -> tuple[dict[str, HessianSpectrum], dict[str, float], list[str]]:
    """Returns the spectra of the layers, their scalars by whole keys, and what is absent, why.

    Args:
        module: The module.
        loss_fn: As in `hessian_spectrum`.
        batches: The probe batches.
        layers: As in `layer_spectra`.
        significance: Level of the Kolmogorov-Smirnov test.
        **options: Of `layer_spectra`.
    """
    with warnings.catch_warnings():  # it is said below, with the other reasons
        warnings.filterwarnings("ignore", message="Layers without a spectrum")
        spent = options.get("max_hvps") is not None and options["max_hvps"] < 1
        spectra = {} if spent else layer_spectra(module, loss_fn, batches, layers=layers, **options)
    scalars: dict[str, float] = {}
    absent = []
    for name, spectrum in spectra.items():
        found, missing = spectrum_scalars(spectrum, significance)
        scalars |= {f"hessian_{name}/{key}": value for key, value in found.items()}
        absent += [f"Layer {name}: {reason}" for reason in missing]
    left_out = [name for name in layer_groups(module, layers) if name not in spectra]
    if left_out:
        absent.append(
            f"No spectrum of the layers {', '.join(left_out)}: the products or the time allowed "
            "were spent before. Raise max_hvps or the time budget, or name fewer layers."
        )
    return spectra, scalars, absent

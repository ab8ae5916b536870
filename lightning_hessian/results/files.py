"""Spectra in files: NumPy's NPZ, read back without running any code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.results.npz import read_npz
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.outside import parse_json, unreadable
from lightning_hessian.results.spectrum import HessianSpectrum, SpectralDensity

_ARRAYS = ("eigenvalues", "residuals", "converged")
_ABOUT = "about"
_REMEDY = "It is no spectrum that lightning_hessian wrote. Delete it and measure again."


def save_spectrum(
    spectrum: HessianSpectrum,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a spectrum, as a whole or not at all.

    Args:
        spectrum: What to write; eigenvectors and density are written where it has them.
        path: The file; its folder must exist.
        extra: What else to keep, as JSON; `load_extra` returns it.
    """
    arrays: dict[str, Any] = {name: getattr(spectrum, name) for name in _ARRAYS}
    if spectrum.eigenvectors is not None:
        arrays["eigenvectors"] = spectrum.eigenvectors.cpu().numpy()
    about: dict[str, Any] = {
        field.name: getattr(spectrum, field.name)
        for field in dataclasses.fields(spectrum)
        if field.name not in (*_ARRAYS, "eigenvectors", "density")
    }
    if (density := spectrum.density) is not None:
        arrays["density_nodes"], arrays["density_weights"] = density.nodes, density.weights
        kept = ("size", "num_products", "exact")
        about["density"] = {name: getattr(density, name) for name in kept}
    arrays[_ABOUT] = np.array(json.dumps({"spectrum": about, "extra": dict(extra or {})}))
    with atomic_write(Path(path)) as file:
        np.savez(file, **arrays)


def load_spectrum(path: str | os.PathLike[str]) -> HessianSpectrum:
    """Return the spectrum that `save_spectrum` wrote.

    Args:
        path: The file; it takes as much memory as it has bytes, whatever it claims.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableFileError: It is not such a file, or damaged; a ValueError.

    Example:
        >>> load_spectrum("nowhere.npz")
        Traceback (most recent call last):
        FileNotFoundError: nowhere.npz does not exist.
    """
    arrays, about = _read(Path(path))
    with unreadable(path, _REMEDY):
        fields = dict(about["spectrum"])
        if (density := fields.pop("density", None)) is not None:
            nodes, weights = arrays.pop("density_nodes"), arrays.pop("density_weights")
            fields["density"] = SpectralDensity(nodes=nodes, weights=weights, **density)
        _check(arrays, fields)
        if "eigenvectors" in arrays:
            import torch

            arrays["eigenvectors"] = torch.from_numpy(arrays["eigenvectors"])
        return HessianSpectrum(**arrays, **fields)


def load_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `save_spectrum` was given to keep beside it; errors as of `load_spectrum`."""
    about = _read(Path(path), only=_ABOUT)[1]
    with unreadable(path, _REMEDY):
        return dict(about["extra"])


def _check(arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Check that arrays and numbers are of the kinds and lengths that a spectrum has."""
    count = len(arrays["eigenvalues"])
    for name, kind in (("eigenvalues", "f"), ("residuals", "f"), ("converged", "b")):
        array = arrays[name]
        if array.shape != (count,) or array.dtype.kind != kind:
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
    if "eigenvectors" in arrays and len(arrays["eigenvectors"]) != count:
        raise ValueError(f"{len(arrays['eigenvectors'])} eigenvectors of {count} eigenvalues")
    for name in ("loss", "num_parameters", "num_samples", "num_hvps", "seconds"):
        if not isinstance(fields[name], (int, float)):
            raise TypeError(f"{name} is {fields[name]!r}")


def _read(path: Path, only: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    with unreadable(path, _REMEDY):
        arrays = read_npz(path, only=None if only is None else [only], remedy=_REMEDY)
        return arrays, parse_json(str(arrays.pop(_ABOUT)))

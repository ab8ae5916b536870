"""Spectra in files: NumPy's NPZ, read back without running any code."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_hessian.results.spectrum import HessianSpectrum, SpectralDensity

_ARRAYS = ("eigenvalues", "residuals", "converged")
_ABOUT = "about"


def save_spectrum(
    spectrum: HessianSpectrum,
    path: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a spectrum, as a whole or not at all.

    Args:
        spectrum: What to write; eigenvectors and density are written where it has them.
        path: The file; its folder must exist.
        extra: What else to keep, as JSON; `load_extra` returns it.
    """
    path = Path(path)
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
        about["density"] = {
            "size": density.size, "num_products": density.num_products, "exact": density.exact,
        }  # fmt: skip
    text = json.dumps({"spectrum": about, "extra": dict(extra or {})})
    contents: dict[str, Any] = {**arrays, _ABOUT: np.array(text)}
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **contents)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_spectrum(path: str | os.PathLike[str]) -> HessianSpectrum:
    """Returns the spectrum that `save_spectrum` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file, or damaged.

    Example:
        >>> load_spectrum("nowhere.npz")
        Traceback (most recent call last):
        FileNotFoundError: nowhere.npz does not exist.
    """
    arrays, about = _read(Path(path))
    fields = about["spectrum"]
    if (density := fields.pop("density", None)) is not None:
        nodes, weights = arrays.pop("density_nodes"), arrays.pop("density_weights")
        fields["density"] = SpectralDensity(nodes=nodes, weights=weights, **density)
    if "eigenvectors" in arrays:
        import torch

        arrays["eigenvectors"] = torch.from_numpy(arrays["eigenvectors"])
    return HessianSpectrum(**arrays, **fields)


def load_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what `save_spectrum` was given to keep beside the spectrum.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file, or damaged.
    """
    return _read(Path(path), only=_ABOUT)[1]["extra"]


def _read(path: Path, only: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files if only is None else [only]
            arrays = {name: file[name] for name in names}
        about = json.loads(str(arrays.pop(_ABOUT)))
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no spectrum that lightning_hessian wrote, or damaged. Delete it and "
            "measure again."
        ) from error
    return arrays, about

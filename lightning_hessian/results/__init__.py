"""The frozen records that travel from room to room, and the errors that a measurement raises."""

from typing import TYPE_CHECKING, Any

from lightning_hessian.results.base import (
    ArgumentError,
    FloatArray,
    MeasurementError,
    NoSecondDerivativeError,
    TimeUpError,
)
from lightning_hessian.results.blocks import BlockStructure
from lightning_hessian.results.gradients import (
    GradientStructure,
    NoiseScale,
    RowTests,
    SortedMagnitudes,
)
from lightning_hessian.results.outside import UnreadableFileError
from lightning_hessian.results.spectrum import (
    Alternative,
    Eigengaps,
    HessianSpectrum,
    PowerLawFit,
    SpectralDensity,
)

if TYPE_CHECKING:
    from lightning_hessian.results.files import load_spectrum, save_spectrum

__all__ = [
    "Alternative",
    "ArgumentError",
    "BlockStructure",
    "Eigengaps",
    "FloatArray",
    "GradientStructure",
    "HessianSpectrum",
    "MeasurementError",
    "NoSecondDerivativeError",
    "NoiseScale",
    "PowerLawFit",
    "RowTests",
    "SortedMagnitudes",
    "SpectralDensity",
    "TimeUpError",
    "UnreadableFileError",
    "load_spectrum",
    "save_spectrum",
]


def __getattr__(name: str) -> Any:
    """Return what reads and writes files, which most who want a record never do."""
    if name not in ("load_spectrum", "save_spectrum"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_hessian.results import files

    return getattr(files, name)

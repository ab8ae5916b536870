"""The frozen records that travel from room to room, and the errors that a measurement raises."""

from lightning_hessian.results.base import (
    ArgumentError,
    FloatArray,
    MeasurementError,
    NoSecondDerivativeError,
    TimeUpError,
)
from lightning_hessian.results.blocks import BlockStructure
from lightning_hessian.results.files import load_spectrum, save_spectrum
from lightning_hessian.results.gradients import GradientStructure, NoiseScale, RowTests
from lightning_hessian.results.outside import UnreadableFileError
from lightning_hessian.results.spectrum import (
    Alternative,
    Eigengaps,
    HessianSpectrum,
    PowerLawFit,
    SpectralDensity,
)

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
    "SpectralDensity",
    "TimeUpError",
    "UnreadableFileError",
    "load_spectrum",
    "save_spectrum",
]

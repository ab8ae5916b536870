"""Hessian spectra of a PyTorch Lightning run, streamed beside its loss."""

from lightning_hessian.callbacks.hessian_spectrum import HessianSpectrumCallback
from lightning_hessian.callbacks.schedule import AtSteps, EveryNValidations
from lightning_hessian.measure import hessian_spectrum
from lightning_hessian.results import Eigengaps, HessianSpectrum, MeasurementError, PowerLawFit
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import fit_power_law

__version__ = "0.1.0.dev0"

__all__ = [
    "AtSteps",
    "Eigengaps",
    "EveryNValidations",
    "HessianSpectrum",
    "HessianSpectrumCallback",
    "MeasurementError",
    "PowerLawFit",
    "eigengaps",
    "fit_power_law",
    "hessian_spectrum",
]

"""Hessian spectra of a PyTorch Lightning run, streamed beside its loss."""

from lightning_hessian.callbacks.gradient_structure import GradientStructureCallback
from lightning_hessian.callbacks.hessian_spectrum import HessianSpectrumCallback
from lightning_hessian.callbacks.schedule import AtSteps, EveryNValidations
from lightning_hessian.histories.load import load_runs
from lightning_hessian.measure.blocks import block_structure
from lightning_hessian.measure.gradients import gradient_structure
from lightning_hessian.measure.layers import layer_spectra
from lightning_hessian.measure.spectrum import hessian_spectrum
from lightning_hessian.probe.partition_rules import BlockRule, partition_rules
from lightning_hessian.reports.report import correlation_report, write_report
from lightning_hessian.results import (
    ArgumentError,
    BlockStructure,
    Eigengaps,
    GradientStructure,
    HessianSpectrum,
    MeasurementError,
    PowerLawFit,
)
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import fit_power_law

__version__ = "0.1.0.dev0"

__all__ = [
    "ArgumentError",
    "AtSteps",
    "BlockRule",
    "BlockStructure",
    "Eigengaps",
    "EveryNValidations",
    "GradientStructure",
    "GradientStructureCallback",
    "HessianSpectrum",
    "HessianSpectrumCallback",
    "MeasurementError",
    "PowerLawFit",
    "block_structure",
    "correlation_report",
    "eigengaps",
    "fit_power_law",
    "gradient_structure",
    "hessian_spectrum",
    "layer_spectra",
    "load_runs",
    "partition_rules",
    "write_report",
]

"""Hessian spectra of a PyTorch Lightning run, streamed beside its loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hessian.callbacks.gradient_structure import GradientStructureCallback
    from lightning_hessian.callbacks.hessian_spectrum import HessianSpectrumCallback
    from lightning_hessian.callbacks.schedule import (
        AtSteps,
        EveryNTrainSteps,
        EveryNValidations,
    )
    from lightning_hessian.histories.load import load_runs
    from lightning_hessian.measure.blocks import BlocksInstrument, block_structure
    from lightning_hessian.measure.budget import Budget
    from lightning_hessian.measure.gradients import GradientsInstrument, gradient_structure
    from lightning_hessian.measure.instrument import Absent, Instrument, Record, Scalars
    from lightning_hessian.measure.layers import LayersInstrument, layer_spectra
    from lightning_hessian.measure.options import LossOptions, PooledSLQ
    from lightning_hessian.measure.preconditioner import Preconditioner
    from lightning_hessian.measure.preconditioner_rules import register_preconditioner
    from lightning_hessian.measure.session import Session
    from lightning_hessian.measure.spectrum import SpectrumInstrument, hessian_spectrum
    from lightning_hessian.measure.stability import StabilityInstrument
    from lightning_hessian.measure.training import Training
    from lightning_hessian.probe.partition_rules import BlockRule, partition_rules
    from lightning_hessian.reports.report import correlation_report, write_report
    from lightning_hessian.results import (
        ArgumentError,
        BlockStructure,
        Eigengaps,
        GradientStructure,
        HessianSpectrum,
        MeasurementError,
        NoSecondDerivativeError,
        PowerLawFit,
    )
    from lightning_hessian.solvers.storage import BasisStorage
    from lightning_hessian.statistics.eigengaps import eigengaps
    from lightning_hessian.statistics.power_law import fit_power_law

__version__ = "0.1.0"

__all__ = [
    "Absent",
    "ArgumentError",
    "AtSteps",
    "BasisStorage",
    "BlockRule",
    "BlockStructure",
    "BlocksInstrument",
    "Budget",
    "Eigengaps",
    "EveryNTrainSteps",
    "EveryNValidations",
    "GradientStructure",
    "GradientStructureCallback",
    "GradientsInstrument",
    "HessianSpectrum",
    "HessianSpectrumCallback",
    "Instrument",
    "LayersInstrument",
    "LossOptions",
    "MeasurementError",
    "NoSecondDerivativeError",
    "PooledSLQ",
    "PowerLawFit",
    "Preconditioner",
    "Record",
    "Scalars",
    "Session",
    "SpectrumInstrument",
    "StabilityInstrument",
    "Training",
    "block_structure",
    "correlation_report",
    "eigengaps",
    "fit_power_law",
    "gradient_structure",
    "hessian_spectrum",
    "layer_spectra",
    "load_runs",
    "partition_rules",
    "register_preconditioner",
    "write_report",
]

_HOMES = {
    "Absent": "measure.instrument",
    "ArgumentError": "results",
    "AtSteps": "callbacks.schedule",
    "BasisStorage": "solvers.storage",
    "BlockRule": "probe.partition_rules",
    "BlockStructure": "results",
    "BlocksInstrument": "measure.blocks",
    "Budget": "measure.budget",
    "Eigengaps": "results",
    "EveryNTrainSteps": "callbacks.schedule",
    "EveryNValidations": "callbacks.schedule",
    "GradientStructure": "results",
    "GradientStructureCallback": "callbacks.gradient_structure",
    "GradientsInstrument": "measure.gradients",
    "HessianSpectrum": "results",
    "HessianSpectrumCallback": "callbacks.hessian_spectrum",
    "Instrument": "measure.instrument",
    "LayersInstrument": "measure.layers",
    "LossOptions": "measure.options",
    "MeasurementError": "results",
    "NoSecondDerivativeError": "results",
    "PooledSLQ": "measure.options",
    "PowerLawFit": "results",
    "Preconditioner": "measure.preconditioner",
    "Record": "measure.instrument",
    "Scalars": "measure.instrument",
    "Session": "measure.session",
    "SpectrumInstrument": "measure.spectrum",
    "StabilityInstrument": "measure.stability",
    "Training": "measure.training",
    "block_structure": "measure.blocks",
    "correlation_report": "reports.report",
    "eigengaps": "statistics.eigengaps",
    "fit_power_law": "statistics.power_law",
    "gradient_structure": "measure.gradients",
    "hessian_spectrum": "measure.spectrum",
    "layer_spectra": "measure.layers",
    "load_runs": "histories.load",
    "partition_rules": "probe.partition_rules",
    "register_preconditioner": "measure.preconditioner_rules",
    "write_report": "reports.report",
}
"""Where each public name lives. A module is imported when one of its names is first asked for, so
that measuring without Lightning does not import Lightning (PEP 562)."""


def __getattr__(name: str) -> Any:
    """Return a public name, from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the names of the module, those not yet imported included."""
    return sorted({*globals(), *__all__})

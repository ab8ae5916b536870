"""Every argument of every public function refuses nonsense where it is given.

The cases come from the signatures, so that a new argument is tested the day it is added: it fails
until it has a rule, or its nonsense has an entry below with the reason why it is none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.measured import BATCHES, MEASURED, NET, loss
from support.nonsense import NONSENSE, is_fine, within

import lightning_hessian
from lightning_hessian import (
    ArgumentError,
    AtSteps,
    BlockRule,
    EveryNTrainSteps,
    EveryNValidations,
    GradientStructureCallback,
    HessianSpectrumCallback,
    MeasurementError,
    block_structure,
    correlation_report,
    eigengaps,
    fit_power_law,
    gradient_structure,
    hessian_spectrum,
    layer_spectra,
    load_runs,
    partition_rules,
    write_report,
)
from lightning_hessian.cli.main import COMMANDS, main
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.losses import linear_cross_entropy
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.gradients import GradientsInstrument
from lightning_hessian.measure.layers import LayersInstrument
from lightning_hessian.measure.options import LossOptions, PooledSLQ
from lightning_hessian.measure.preconditioner import Preconditioner
from lightning_hessian.measure.preconditioner_rules import register_preconditioner
from lightning_hessian.measure.spectrum import SpectrumInstrument
from lightning_hessian.measure.stability import StabilityInstrument
from lightning_hessian.reports.live import follow
from lightning_hessian.solvers.storage import BasisStorage
from lightning_hessian.statistics import power_law, significance, subspace, theory
from lightning_hessian.tracking.power_law_metric import PowerLawMetric


class OwnOptimizer(torch.optim.Optimizer):
    """One that nobody knows."""


MATRICES = {"inputs": [[1.0, 2.0]], "W": [[1.0, 1.0]], "V": [[1.0], [2.0]]}
ZIPF = {"num_eigenvalues": 5, "slope": 1.0}


def _checked(callback: type) -> Callable[..., Any]:
    """Returns what makes a callback and checks it against a module, as `fit` does first."""

    def make(**given: Any) -> Any:
        made = callback(**given)
        made.check(NET)
        return made

    make.__signature__ = inspect.signature(callback)  # type: ignore[attr-defined]
    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine rows in a folder of its own."""
    folder = tmp_path_factory.mktemp("run")
    rows = "".join(f"{i},{1 / (i + 1)},{0.1 + 0.01 * (i * 7 % 5)}\n" for i in range(9))
    (folder / "metrics.csv").write_text("step,val_loss,hessian/d_ks\n" + rows)
    return folder


RUN = object()
"""Stands for the folder of the fixture."""
REPORT = object()
"""Stands for the report over it."""

PUBLIC: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hessian_spectrum": (hessian_spectrum, {**MEASURED, "num_eigenvalues": 2, "trace_probes": 2}),
    "layer_spectra": (
        layer_spectra,
        {**MEASURED, "num_eigenvalues": 1, "trace_probes": 0, "layers": {"last": "layers.2.*"}},
    ),
    "block_structure": (block_structure, MEASURED),
    "gradient_structure": (
        gradient_structure,
        {"model": NET, "loss_fn": loss, "data": BATCHES, "num_gradients": 4, "batch_size": 2,
         "num_eigenvalues": 2, "tests": False},
    ),
    "HessianSpectrumCallback": (_checked(HessianSpectrumCallback), {"num_eigenvalues": 2}),
    "GradientStructureCallback": (
        _checked(GradientStructureCallback),
        {"num_gradients": 4, "tests": False},
    ),
    "AtSteps": (AtSteps, {"steps": [1]}),
    "EveryNTrainSteps": (EveryNTrainSteps, {"n": 1}),
    "EveryNValidations": (EveryNValidations, {"n": 1}),
    "BlockRule": (BlockRule, {"parameter": "*", "block": "all"}),
    "partition_rules": (partition_rules, {"module": NET, "name": "layer"}),
    "fit_power_law": (fit_power_law, {"values": [5.0, 3.0, 2.0, 1.0]}),
    "eigengaps": (eigengaps, {"eigenvalues": [9.0, 5.0, 3.0, 2.0, 1.5, 1.0]}),
    "load_runs": (load_runs, {"source": RUN, "cache": False}),
    "correlation_report": (correlation_report, {"runs": RUN}),
    "write_report": (write_report, {"report": REPORT, "out": "page"}),
    "Budget": (Budget, {}),
    "BasisStorage": (BasisStorage, {}),
    "LossOptions": (LossOptions, {}),
    "PooledSLQ": (PooledSLQ, {}),
    "SpectrumInstrument": (SpectrumInstrument, {}),
    "BlocksInstrument": (BlocksInstrument, {}),
    "LayersInstrument": (LayersInstrument, {}),
    "GradientsInstrument": (GradientsInstrument, {"num_gradients": 4, "tests": False}),
    "StabilityInstrument": (StabilityInstrument, {}),
    "Preconditioner": (Preconditioner, {"threshold": 1.0}),
    "register_preconditioner": (
        register_preconditioner,
        {"optimizer_class": OwnOptimizer, "function": lambda parameter, group, state: None},
    ),
}  # fmt: skip
"""What ``lightning_hessian`` exports, with arguments that work."""

DOCUMENTED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "significance.critical_value": (significance.critical_value, {"k": 9}),
    "significance.lilliefors_p_value": (
        significance.lilliefors_p_value, {"ks_distance": 0.1, "k": 9},
    ),
    "power_law.optimal_cutoff": (
        power_law.optimal_cutoff, {"values": np.arange(1.0, 30.0), "k_min": 5},
    ),
    "power_law.ks_distance_by_cutoff": (power_law.ks_distance_by_cutoff, {"values": [4.0, 2, 1]}),
    "power_law.exponent_std_error": (power_law.exponent_std_error, {"exponent": 2.0, "k": 9}),
    "power_law.slope": (power_law.slope, {"exponent": 2.0}),
    "subspace.num_outliers": (subspace.num_outliers, {"eigenvalues": [9.0, 5, 3, 2, 1.5]}),
    "theory.linear_mse_hessian": (
        theory.linear_mse_hessian, {"inputs": [[1.0, 2.0]], "num_classes": 2},
    ),
    "theory.linear_cross_entropy_hessian": (
        theory.linear_cross_entropy_hessian, {"inputs": [[1.0, 2.0]], "V": [[1.0, 1.0]]},
    ),
    "theory.hidden_mse_hessian": (theory.hidden_mse_hessian, {**MATRICES, "targets": [[1.0, 0.0]]}),
    "theory.hidden_cross_entropy_hessian": (
        theory.hidden_cross_entropy_hessian, {**MATRICES, "labels": [1]},
    ),
    "theory.class_ratio_limit": (theory.class_ratio_limit, {"gamma": 1.0}),
    "theory.class_ratio": (theory.class_ratio, {"gamma": 1.0, "num_classes": 3}),
    "theory.hidden_ratio_mse": (theory.hidden_ratio_mse, {"gamma": 1.0, "num_classes": 3}),
    "theory.marchenko_pastur": (theory.marchenko_pastur, {"x": [1.0], "ratio": 0.5}),
    "theory.marchenko_pastur_edges": (theory.marchenko_pastur_edges, {"ratio": 0.5}),
    "theory.semicircle": (theory.semicircle, {"x": [1.0]}),
    "theory.max_entropy_density": (theory.max_entropy_density, {"x": [1.0], "beta": 2.0}),
    "theory.zipf_eigenvalues": (theory.zipf_eigenvalues, ZIPF),
    "theory.zipf_eigengaps": (theory.zipf_eigengaps, ZIPF),
    "theory.eigengaps_of_values": (
        theory.eigengaps_of_values, {"eigenvalues": [3.0, 2.0, 1.0], "slope": 1.0},
    ),
    "theory.approximate_eigengaps": (theory.approximate_eigengaps, ZIPF),
    "theory.eigenvector_bound": (
        theory.eigenvector_bound, {**ZIPF, "perturbation": 0.1, "lambda_1": 1.0},
    ),
    "PowerLawMetric": (PowerLawMetric, {}),
    "losses.linear_cross_entropy": (
        linear_cross_entropy,
        {"hidden": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "targets": torch.tensor([0, 1])},
    ),
    "follow": (follow, {"folder": RUN, "out": "page", "monitor": "val_loss", "once": True}),
    "read_spectra": (read_spectra, {"path": RUN}),
    "read_offline_run": (read_offline_run, {"path": RUN}),
}  # fmt: skip
"""What the documentation names besides."""

MISSING_FILES = {"source", "runs", "folder", "path"}
"""Arguments of which a path that is not there raises FileNotFoundError, which names the path."""


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


def _call(name: str, run: Path, /, **changed: Any) -> Any:
    function, base = {**PUBLIC, **DOCUMENTED}[name]
    given = {key: run if value is RUN else value for key, value in {**base, **changed}.items()}
    given = {key: correlation_report(run) if v is REPORT else v for key, v in given.items()}
    return function(**given)


CASES = [
    pytest.param(name, parameter, id=f"{name}-{parameter.name}")
    for name, (function, _) in {**PUBLIC, **DOCUMENTED}.items()
    for parameter in _parameters(function)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_nonsense_is_refused_by_the_name_of_its_argument(
    name: str, parameter: inspect.Parameter, run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    accepted, badly = [], []
    for label, value in NONSENSE.items():
        if is_fine(name, parameter, label):
            continue
        try:
            with within(20):
                _call(name, run, **{parameter.name: value})
        except (ArgumentError, ValueError, MeasurementError) as error:
            if parameter.name not in str(error):
                badly.append(f"{label}: {error}")
        except FileNotFoundError as error:
            if parameter.name not in MISSING_FILES or "x" not in str(error):
                badly.append(f"{label}: {error!r}")
        else:
            accepted.append(label)
    assert not accepted, f"{name}({parameter.name}=...) takes {accepted}"
    assert not badly


def test_what_is_public_is_tested() -> None:
    """Records are made, errors are raised; protocols and a session come with an instrument."""
    records = {
        "Absent", "ArgumentError", "BlockStructure", "Eigengaps", "GradientStructure",
        "HessianSpectrum", "Instrument", "MeasurementError", "NoSecondDerivativeError",
        "PowerLawFit", "Record", "Scalars", "Session", "Training",
    }  # fmt: skip
    assert set(lightning_hessian.__all__) - records == set(PUBLIC)


def _with_rules() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, (function, _) in {**PUBLIC, **DOCUMENTED}.items():
        if inspect.isfunction(function) and hasattr(function, "rules"):
            yield name, function.rules
    for callback in (HessianSpectrumCallback, GradientStructureCallback):
        yield callback.__name__, callback.__init__.rules  # type: ignore[misc]


@pytest.mark.parametrize(("name", "table"), list(_with_rules()))
def test_every_argument_has_a_rule(name: str, table: dict[str, Any]) -> None:
    open_ones = [key for key, rule in table.items() if rule is None]
    assert set(open_ones) <= {"self", "options"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_what_is_no_nonsense_is_taken_or_refused_in_words(
    name: str, parameter: inspect.Parameter, run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An entry of the list above must not stand for a hang or an error from deep inside."""
    monkeypatch.chdir(tmp_path)
    for label, value in NONSENSE.items():
        if not is_fine(name, parameter, label):
            continue
        with within(60), suppress(ValueError, MeasurementError, OSError):
            _call(name, run, **{parameter.name: value})


GROUPS = {
    "functions that measure": {
        "hessian_spectrum", "layer_spectra", "block_structure", "gradient_structure",
    },
    "callbacks": {"HessianSpectrumCallback", "GradientStructureCallback"},
    "schedules and partitions": {
        "AtSteps", "EveryNTrainSteps", "EveryNValidations", "BlockRule", "partition_rules",
    },
    "options and instruments": {
        "Budget", "BasisStorage", "LossOptions", "PooledSLQ", "SpectrumInstrument",
        "BlocksInstrument", "LayersInstrument", "GradientsInstrument", "StabilityInstrument",
        "Preconditioner", "register_preconditioner",
    },
    "losses": {"losses.linear_cross_entropy"},
    "runs and reports": {
        "load_runs", "correlation_report", "write_report", "follow", "read_spectra",
        "read_offline_run",
    },
}  # fmt: skip


def table() -> str:
    """Returns the table of docs/trust.md; what it counts as refused, the test above refuses."""
    lines = [
        "| | arguments | cases | refused | sense after all |",
        "| --- | --- | --- | --- | --- |",
    ]
    everything = {**PUBLIC, **DOCUMENTED}
    rest = set(everything) - set().union(*GROUPS.values())
    for title, members in {**GROUPS, "statistics, theory, metric": rest}.items():
        arguments = [(name, p) for name in members for p in _parameters(everything[name][0])]
        fine = sum(is_fine(name, p, label) for name, p in arguments for label in NONSENSE)
        cases = len(arguments) * len(NONSENSE)
        lines.append(f"| {title} | {len(arguments)} | {cases} | {cases - fine} | {fine} |")
    return "\n".join(lines)


def test_the_documentation_has_the_table_of_these_cases() -> None:
    text = (Path(__file__).parents[1] / "docs" / "trust.md").read_text(encoding="utf-8")
    part = text.partition("<!-- arguments: begin -->")[2].partition("<!-- arguments: end -->")[0]
    assert table() in part, f"docs/trust.md, section Arguments, wants this table:\n{table()}"


# Commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_refuses_nonsense(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and at most two lines, for an empty text and for words where numbers belong."""
    base = {
        "demo": [],
        "measure": ["last.ckpt", "--module", "m.py:Net"],
        "report": [str(run)],
        "workspace": ["me/digits"],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    flags = sorted(set(re.findall(r"^ +(--[a-z-]+) [A-Z{]", capsys.readouterr().out, re.MULTILINE)))
    assert flags
    for flag in flags:
        for nonsense in ("", "nan", "-1"):
            if nonsense and flag in _TEXTS:
                continue
            assert main([command, *base, f"{flag}={nonsense}"]) == 2, (flag, nonsense)
            lines = capsys.readouterr().err.strip().splitlines()
            assert 1 <= len(lines) <= 2
            assert flag in lines[0] or flag.strip("-") in lines[0]


_TEXTS = {
    "--out", "--parameters", "--module", "--data", "--loss", "--module-arg", "--data-arg",
    "--monitor", "--statistic", "--group", "--size", "--filter", "--name", "--spec", "--publish",
}  # fmt: skip
"""Flags whose values are names; what they name is looked for later."""

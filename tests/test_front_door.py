"""The front door: what a user imports, and what that brings with it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_hessian

WITHOUT_LIGHTNING = [
    "Absent",
    "ArgumentError",
    "BasisStorage",
    "BlockRule",
    "BlockStructure",
    "BlocksInstrument",
    "Budget",
    "Eigengaps",
    "GradientStructure",
    "GradientsInstrument",
    "HessianSpectrum",
    "Instrument",
    "LayersInstrument",
    "LossOptions",
    "MeasurementError",
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
    "eigengaps",
    "fit_power_law",
    "gradient_structure",
    "hessian_spectrum",
    "layer_spectra",
    "partition_rules",
    "register_preconditioner",
]
WITH_LIGHTNING = ["GradientStructureCallback", "HessianSpectrumCallback"]
HEAVY = {
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "mpmath",
    "pandas",
    "powerlaw",
    "pytorch_lightning",
    "scipy",
    "sympy",
    "torchmetrics",
    "wandb",
}
MOST_OTHERS, MOST_OWN = 45, 130
"""Modules of other packages, and our own. A clock would measure the machine's other work."""


def _imported(statement: str) -> list[str]:
    """Return the modules that a statement imports in a fresh process, beyond those of torch."""
    code = (
        f"import json, sys, torch; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(lightning_hessian.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def _tops(modules: list[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_the_package_itself_imports_nothing() -> None:
    assert _imported("import lightning_hessian") == ["lightning_hessian"]


def test_measuring_without_lightning_imports_neither_lightning_nor_anything_slow() -> None:
    modules = _imported(f"from lightning_hessian import {', '.join(WITHOUT_LIGHTNING)}")
    assert not _tops(modules) & HEAVY
    assert not {"torch.distributed.tensor", "torch.distributed.fsdp"} & set(modules)
    own = [module for module in modules if module.startswith("lightning_hessian")]
    assert len(modules) - len(own) <= MOST_OTHERS
    assert len(own) <= MOST_OWN


def test_one_function_imports_less_than_all() -> None:
    assert len(_imported("from lightning_hessian import fit_power_law")) < 50


def test_a_measurement_of_a_plain_module_imports_no_lightning() -> None:
    modules = _imported(
        "import torch; from lightning_hessian import hessian_spectrum; "
        "hessian_spectrum(torch.nn.Linear(2, 1), lambda m, b: m(b).square().mean(), "
        "[torch.ones(4, 2)], num_eigenvalues=1)"
    )
    assert not _tops(modules) & {"lightning", "pytorch_lightning", "matplotlib", "wandb"}


@pytest.mark.parametrize("name", lightning_hessian.__all__)
def test_every_name_is_there(name: str) -> None:
    assert name in dir(lightning_hessian)
    assert getattr(lightning_hessian, name).__name__ == name


def test_names_are_those_that_type_checkers_and_editors_see() -> None:
    tree = ast.parse(Path(lightning_hessian.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(lightning_hessian.__all__) == set(lightning_hessian._HOMES)
    homes = {name: f"lightning_hessian.{home}" for name, home in lightning_hessian._HOMES.items()}
    assert homes == seen


def test_every_name_is_asked_for_here() -> None:
    assert {*WITHOUT_LIGHTNING, *WITH_LIGHTNING} <= set(lightning_hessian.__all__)
    others = {
        "AtSteps", "EveryNTrainSteps", "EveryNValidations", "NoSecondDerivativeError",
        "correlation_report", "load_runs", "write_report",
    }  # fmt: skip
    assert set(lightning_hessian.__all__) == {*WITHOUT_LIGHTNING, *WITH_LIGHTNING, *others}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'hessian_spectra'"):
        _ = lightning_hessian.hessian_spectra
    with pytest.raises(ImportError, match="cannot import name 'hessian_spectra'"):
        exec("from lightning_hessian import hessian_spectra")

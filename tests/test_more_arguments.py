"""Nonsense that no other argument has: of models, batches, selections, schedules and bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.measured import BATCHES, MEASURED, NET, Net, loss
from support.nonsense import within
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import (
    ArgumentError,
    AtSteps,
    GradientStructureCallback,
    HessianSpectrumCallback,
    gradient_structure,
    hessian_spectrum,
    layer_spectra,
)
from lightning_hessian.solvers.storage import BasisStorage


@pytest.mark.parametrize("unknown", ["num_eigenvalue", "parameters"])
def test_an_unknown_option_of_a_layer_is_refused(unknown: str) -> None:
    with pytest.raises(TypeError, match=unknown):
        layer_spectra(**MEASURED, **{unknown: "*"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": Net}, "It is a class; give an instance, Net"),
        ({"model": nn.Identity()}, "no parameter that requires grad"),
        ({"batches": torch.zeros(3, 4)}, "list of batches"),
        ({"batches": {"a": 1}}, "list of batches"),
        ({"batches": [None]}, "Batch 0 is None"),
        ({"batches": [*BATCHES, "ab"]}, "Batch 2 is 'ab'"),
        ({"batches": [[]]}, r"Batch 0 is \[\]"),
        ({"batches": DataLoader}, "It is a class"),
        ({"parameters": "re:("}, "no regular expression"),
        ({"parameters": [5]}, "Give a glob"),
        ({"parameters": lambda name: True}, r"parameters\(name, parameter\) -> bool"),
        ({"parameters": NET}, "Give a glob"),
        ({"budget": 500}, "Give Budget"),
        ({"loss_options": "eval"}, "Give LossOptions"),
        ({"protocol": "pooled_slq"}, "Give 'converged', or PooledSLQ"),
        ({"basis": 1e9}, "Give BasisStorage"),
        ({"checkpoint": "/no/such/folder/file"}, "no folder '/no/such/folder'"),
        ({"checkpoint": "."}, "It is a folder"),
    ],
)
def test_more_nonsense_for_a_measurement(arguments: dict[str, Any], words: str) -> None:
    (name,) = arguments
    with pytest.raises(ArgumentError, match=f"^{name}.*{words}"):
        hessian_spectrum(**{**MEASURED, "num_eigenvalues": 2, **arguments})


def test_the_folder_of_a_basis() -> None:
    with pytest.raises(ArgumentError, match="no folder '/no/such/folder'"):
        BasisStorage(tier="disk:/no/such/folder")


@pytest.mark.parametrize(
    "layers", [{"a": None}, {"a/b": "*"}, {"": "*"}, {3: "*"}, {"a": 5}, ["a"]]
)
def test_names_of_layers(layers: Any) -> None:
    with pytest.raises(ArgumentError, match="layers"):
        layer_spectra(**MEASURED, layers=layers)


@pytest.mark.parametrize(
    "data",
    [TensorDataset(torch.zeros(4, 4)), DataLoader(TensorDataset(torch.zeros(4, 4))), BATCHES],
)
def test_what_gradients_are_drawn_from(data: Any) -> None:
    GradientStructureCallback(data=data)


def test_schedules() -> None:
    assert AtSteps(range(0, 30, 10)).steps == (0, 10, 20)
    assert AtSteps(np.array([1, 5])).steps == (1, 5)
    for wrong in (AtSteps, object(), type("Own", (), {"is_due": lambda self: True})()):
        with pytest.raises(ArgumentError, match=r"every_n_validations|is_due"):
            HessianSpectrumCallback(every_n_validations=wrong)
    for steps in ([1.5], [-1], [True], ["1"], "12", 5):
        with pytest.raises(ArgumentError, match="steps="):
            AtSteps(steps)


@pytest.mark.parametrize("num_gradients", [10**12, 10**7])
def test_more_gradients_than_memory_holds_are_refused_with_the_number_that_fits(
    num_gradients: int,
) -> None:
    with within(10), pytest.raises(ArgumentError, match=r"num_gradients=.*to \d+ at most"):
        GradientStructureCallback(num_gradients=num_gradients)
    with within(10), pytest.raises(ArgumentError, match=r"Lower num_gradients to 250 at most"):
        gradient_structure(
            NET, loss, BATCHES, num_gradients=251, tests=False, memory_budget=1_000_000
        )

"""The rules that arguments are checked by."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.measured import NET
from support.nonsense import HUGE

from lightning_hessian import (
    ArgumentError,
)
from lightning_hessian.results import arguments as rules


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_become_ints(value: Any) -> None:
    found = rules.whole_number(least=1)("count", value)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value", [3.0, "3", True, np.True_, torch.tensor(True), torch.tensor(2.5), [3], HUGE]
)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^count=.* cannot be used\. Give a whole number"):
        rules.whole_number(least=1, most=100)("count", value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2)])
def test_real_numbers_are_taken(value: Any) -> None:
    assert rules.tolerance("tol", value) == 0.5


@pytest.mark.parametrize("value", [0, 1, 1e9, -0.1, math.nan, math.inf, "0.5", True, 1 + 0j, None])
def test_a_tolerance_lies_between_0_and_1(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^tol=.*between 0 and 1"):
        rules.tolerance("tol", value)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, None, "x", 1.5, True])
def test_a_seed_is_one_that_every_generator_takes(seed: Any) -> None:
    with pytest.raises(ArgumentError, match=r"seed=.*from 0 to 4,294,967,295"):
        rules.seed_number("seed", seed)
    for most in (0, rules.MOST_SEED):
        np.random.default_rng(rules.seed_number("seed", most))
        np.random.RandomState(most)
        torch.Generator().manual_seed(most)


class Callable2:
    def __call__(self, module: Any, batch: Any, scale: float = 1.0) -> Any:
        return None


@pytest.mark.parametrize("function", [lambda a, b: None, lambda *a: None, Callable2(), max])
def test_functions_that_can_be_called_are_taken(function: Any) -> None:
    assert rules.function_of("module", "batch")("loss_fn", function) is function


@pytest.mark.parametrize(
    "function", [lambda a: None, lambda a, b, c: None, lambda a, *, b: None, Callable2, "f", 5]
)
def test_functions_that_cannot_be_called_are_refused(function: Any) -> None:
    with pytest.raises(ArgumentError, match=r"loss_fn=.*loss_fn\(module, batch\)"):
        rules.function_of("module", "batch")("loss_fn", function)


class BadRepr:
    def __repr__(self) -> str:
        raise KeyError("no words")


@pytest.mark.parametrize("value", [BadRepr(), HUGE, torch.zeros(50, 50), "x" * 10**6, NET])
def test_a_message_is_one_short_line_whatever_the_value(value: Any) -> None:
    text = str(ArgumentError("count", value, "Give a whole number."))
    assert "\n" not in text
    assert len(text) < 150
    assert text.startswith("count=")

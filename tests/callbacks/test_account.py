"""The account of what a run has earned and spent, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_hessian.callbacks.account import Account
from lightning_hessian.measure.budget import Budget


def account(share: float | None = 0.1, **given: Any) -> Account:
    return Account(Budget(share=share), **given)


def test_nothing_is_asked_before_a_product_was_timed_or_without_a_bound() -> None:
    assert account().allows(done=0.1, last=False)
    assert account(None, estimate=1e9, trained=1.0).allows(done=0.1, last=False)


@pytest.mark.parametrize(
    ("done", "allowed"),
    [(0.1, True), (0.51, False), (None, False)],  # the run pays for 10, for 1.96, for nobody knows
)
def test_the_first_is_made_on_credit_where_the_run_pays_for_the_last_too(
    done: float | None, allowed: bool
) -> None:
    found = account(trained=100.0, estimate=10.0 if done != 0.1 else 10.1)
    found.pay(0.001)
    assert found.allows(done=done, last=False) == allowed


def test_between_first_and_last_a_measurement_is_made_once_it_is_saved_up() -> None:
    found = account(trained=10.0, estimate=2.0)
    assert found.allows(done=0.05, last=False)
    found.pay(2.0)
    found.measured(2.0)
    for trained, allowed in ((39.0, False), (40.0, True)):
        found.trained = trained
        assert found.allows(done=0.05, last=False) == allowed
        assert found.allows(done=0.05, last=True)


@pytest.mark.parametrize("num_validations", [6, 20, 200])
@pytest.mark.parametrize("seconds", [0.05, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_share_is_kept_but_for_the_last(
    num_validations: int, seconds: float, noise: float
) -> None:
    """A fit by a clock of our own, with epochs of a second: at most 10 % over before the last."""
    generator = torch.Generator().manual_seed(0)
    found = account(0.2, estimate=seconds)
    for validation in range(1, num_validations + 1):
        found.earn(1.0)
        last = validation == num_validations
        if last:
            assert found.spent <= 1.1 * 0.2 * num_validations
        if found.allows(done=validation / num_validations, last=last):
            taken = seconds * (1 + noise * float(torch.rand((), generator=generator)))
            found.pay(taken)
            found.measured(taken)
        else:
            assert not last
    affordable = 0.2 * num_validations / (seconds * (1 + noise))
    assert found.made >= min(num_validations, max(1, math.floor(affordable)))


def test_a_clock_that_is_set_back_earns_and_costs_nothing() -> None:
    found = account(trained=5.0, spent=0.1)
    found.earn(-3.0)
    found.pay(-3.0)
    assert (found.trained, found.spent) == (5.0, 0.1)


def test_an_account_goes_on_after_a_checkpoint() -> None:
    found = account(trained=5.0, spent=0.25, made=2)
    resumed = Account.checked(found.budget, found.state_dict())
    assert (resumed.trained, resumed.spent, resumed.made) == (5.0, 0.25, 2)


@pytest.mark.parametrize("bad", [-1.0, math.nan, "1", None, True])
def test_a_damaged_account_is_refused(bad: Any) -> None:
    state = {**account().state_dict(), "spent": bad}
    with pytest.raises(ValueError, match="spent="):
        Account.checked(Budget(share=0.1), state)


def test_few_products_take_half_of_what_is_earned_at_most() -> None:
    found = account(0.2, estimate=50.0, estimate_of_few=0.07)
    made = 0
    for _ in range(100):
        found.earn(1.0)
        if found.allows_few():
            found.pay_few(0.07)
            made += 1
            assert found.spent_on_few <= 0.1 * found.trained
    assert made == 100
    assert found.saved == pytest.approx(20 - 100 * 0.07)
    found.estimate_of_few = 3.1  # more than half of 20 has left
    assert not found.allows_few()
    assert not account(0.2, estimate=5.0, trained=100.0).allows_few()  # there are none
    assert not account(None, estimate_of_few=0.1, trained=100.0).allows_few()

"""What may still be done: products, seconds, and one answer on all ranks."""

from __future__ import annotations

import itertools

import pytest

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.ranks import Ranks


class Clock:
    """Shows what a test sets it to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class WithAnother(Ranks):
    """Two ranks, of which the other says what a test lets it say, and is asked how often."""

    def __init__(self, *says: bool) -> None:
        super().__init__()
        object.__setattr__(self, "says", iter(says))
        object.__setattr__(self, "asked", [])

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag or next(self.says)


def test_without_a_bound_everything_may_be_done():
    allowance = Allowance()
    allowance.spend(10**9)
    assert allowance.affords(10**12)
    assert not allowance.is_over()
    assert allowance.products_left is None
    assert not UNBOUNDED.is_over()


@pytest.mark.parametrize("bound", [0, 1, 7])
def test_products_are_counted_down_to_zero_and_no_further(bound):
    allowance = Allowance(products=bound)
    assert allowance.products_left == bound
    assert allowance.affords(bound)
    assert not allowance.affords(bound + 1)
    for spent in range(1, bound + 1):
        allowance.spend(1)
        assert (allowance.spent, allowance.products_left) == (spent, bound - spent)
    allowance.spend(3)  # a block of several may go beyond
    assert allowance.products_left == 0
    assert not allowance.affords(1)
    assert not allowance.is_over()  # that is a question of time


def test_the_time_is_up_at_the_second_it_was_given():
    clock = Clock()
    allowance = Allowance(seconds=5, clock=clock)
    for passed, over in ((0, False), (4.999, False), (5, True), (6, True)):
        clock.now = 100 + passed
        assert allowance.is_over() == over
        assert allowance.seconds_passed == pytest.approx(passed)
        assert allowance.affords(1) != over


def test_no_seconds_at_all_are_up_at_once():
    assert Allowance(seconds=0, clock=Clock()).is_over()


def test_what_a_product_takes_decides_what_can_be_afforded():
    clock = Clock()
    allowance = Allowance(seconds=10, clock=clock)
    assert allowance.affords(10**6)  # nobody knows yet what one takes
    allowance.seconds_a_product = 0.5
    assert allowance.affords(19)
    assert not allowance.affords(21)
    clock.now += 8
    assert allowance.affords(3)
    assert not allowance.affords(5)
    both = Allowance(products=2, seconds=10, clock=clock)
    assert not both.affords(3)


def test_a_part_of_the_products_may_be_set_aside():
    allowance = Allowance(products=10)
    allowance.spend(4)
    with allowance.limited_to(2):
        assert allowance.products_left == 2
        allowance.spend(2)
        assert allowance.products_left == 0
    assert allowance.products_left == 4
    with allowance.limited_to(100):  # the whole is a bound all the same
        assert allowance.products_left == 4
    with pytest.raises(KeyError), allowance.limited_to(1):
        raise KeyError
    assert allowance.products_left == 4
    unbounded = Allowance()
    with unbounded.limited_to(3):
        assert unbounded.products_left == 3
    assert unbounded.products_left is None


def test_progress_is_told_at_every_spending():
    told: list[tuple[int, int | None]] = []
    allowance = Allowance(on_progress=lambda *what: told.append(what))
    allowance.spend(2)
    allowance.note_converged(3)
    allowance.spend(1)
    assert told == [(2, None), (3, 3)]


# Several ranks ----------------------------------------------------------------------------------


def test_no_rank_stops_alone():
    clock = Clock()
    for other in (False, True):
        allowance = Allowance(seconds=5, clock=clock, ranks=WithAnother(other, other))
        assert allowance.is_over() == other
        assert allowance.affords(1) != other
    clock.now += 5
    assert Allowance(seconds=0, clock=clock, ranks=WithAnother()).is_over()


def test_ranks_talk_where_there_is_a_bound_in_seconds_and_nowhere_else():
    silent = WithAnother()
    allowance = Allowance(products=5, ranks=silent)
    assert allowance.affords(5)
    assert not allowance.affords(6)
    assert not allowance.is_over()
    assert silent.asked == []
    heard = WithAnother(False, False)
    allowance = Allowance(products=5, seconds=5, ranks=heard, clock=Clock())
    assert allowance.affords(5)
    assert not allowance.affords(6)  # the same on all ranks: no need to ask
    assert not allowance.is_over()
    assert heard.asked == [False, False]


def test_a_clock_is_asked_once_a_question():
    ticking = itertools.count()
    allowance = Allowance(seconds=3, clock=ticking.__next__)
    assert [allowance.is_over() for _ in range(4)] == [False, False, True, True]

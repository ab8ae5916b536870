"""Allowances whose time is up when a test says so, by a clock of their own."""

from __future__ import annotations

from lightning_hessian.linear.allowance import Allowance


class Questions:
    """A clock that ticks once whenever it is read.

    Attributes:
        time: How often it was read.
    """

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        """Return the time, a second later than at the reading before."""
        self.time += 1.0
        return self.time


def stop_after(questions: int) -> Allowance:
    """Return an allowance that says ``is_over()`` after so many times that it has not been."""
    return Allowance(seconds=questions + 1.0, clock=Questions())

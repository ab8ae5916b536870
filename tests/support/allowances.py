"""Allowances that end where a test wants them to: real ones, by clocks of our own."""

from __future__ import annotations

import itertools
from typing import Any

from lightning_hessian.linear.allowance import Allowance


def stop_after(questions: int) -> Allowance:
    """Return an allowance that says ``is_over()`` after so many times that it has not been."""
    return Allowance(seconds=questions + 1, clock=itertools.count().__next__)


def stop_at_product(operator: Any, product: int) -> Allowance:
    """Return an allowance whose time is up once an operator that counts has made so many."""
    begun = operator.num_products
    return Allowance(seconds=product - begun, clock=lambda: operator.num_products)

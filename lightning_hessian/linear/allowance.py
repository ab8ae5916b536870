"""How much work may still be done: products, seconds and progress, alike on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_hessian.linear.ranks import ALONE, Ranks


class Allowance:
    """What is left of a budget while a measurement runs.

    Whoever makes products spends them here; whoever makes many asks `is_over` between them. Both
    questions have one answer on all ranks, so that no rank leaves a loop alone: ``is_over`` and
    ``affords`` are collectives wherever there is a limit in seconds, and all ranks ask them at the
    same places.

    Args:
        products: How many products may be made; None for no bound.
        seconds: How much time may pass from now on; None for no bound.
        ranks: Who measures together.
        on_progress: ``on_progress(num_products, num_converged)``, called whenever products have
            been spent.
        clock: What tells the time, in seconds; by default the monotonic clock.

    Attributes:
        spent: Products spent so far.
        seconds_a_product: What a product takes, where that is known; `affords` reckons with it.
        was_over: Whether anybody has been told that the time is up, or too short.

    Example:
        >>> allowance = Allowance(products=10)
        >>> allowance.spend(7)
        >>> allowance.products_left, allowance.affords(4), allowance.is_over()
        (3, False, False)
    """

    def __init__(
        self,
        *,
        products: int | None = None,
        seconds: float | None = None,
        ranks: Ranks = ALONE,
        on_progress: Callable[[int, int | None], None] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.products = products
        self.seconds = seconds
        self.spent = 0
        self.seconds_a_product: float | None = None
        self.was_over = False
        self._ranks = ranks
        self._on_progress = on_progress
        self._num_converged: int | None = None
        self._clock = clock or time.monotonic
        self._begun = self._clock()

    @property
    def products_left(self) -> int | None:
        """How many products may still be made; None for no bound."""
        return None if self.products is None else max(0, self.products - self.spent)

    @property
    def seconds_passed(self) -> float:
        """How long this allowance has been open."""
        return self._clock() - self._begun

    @property
    def is_late(self) -> bool:
        """Whether the time is up by this rank's own clock; the others may see it differently."""
        return self.seconds is not None and self.seconds_passed >= self.seconds

    def affords(self, products: int) -> bool:
        """Return whether a piece of work that takes so many products may begin."""
        left = self.products_left
        if left is not None and products > left:
            return False
        if self.seconds is None:
            return True
        needed = products * (self.seconds_a_product or 0.0)
        short = self._ranks.any(self.seconds_passed + needed >= self.seconds)
        self.was_over = self.was_over or short
        return not short

    @contextmanager
    def limited_to(self, products: int) -> Iterator[None]:
        """Allow only so many more products within a block, and no more than are left anyway."""
        whole, limit = self.products, self.spent + products
        self.products = limit if whole is None else min(whole, limit)
        try:
            yield
        finally:
            self.products = whole

    def is_over(self) -> bool:
        """Return whether the time is up."""
        if self.seconds is None:
            return False
        over = self._ranks.any(self.seconds_passed >= self.seconds)
        self.was_over = self.was_over or over
        return over

    def spend(self, products: int) -> None:
        """Count products that were made, and tell the progress."""
        self.spent += products
        if self._on_progress is not None:
            self._on_progress(self.spent, self._num_converged)

    def note_converged(self, count: int) -> None:
        """Remember how many eigenvalues have converged, for the progress to tell."""
        self._num_converged = count


UNBOUNDED = Allowance()
"""For work without a bound; nobody counts on what was spent of it."""

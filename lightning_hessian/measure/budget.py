"""What a measurement may cost: products, seconds, a share of the training time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.results.arguments import (
    check_fields,
    instance_of,
    optional,
    real_number,
    seconds,
    whole_number,
)

if TYPE_CHECKING:
    from lightning_hessian.measure.session import Session


@dataclass(frozen=True, repr=False)
class Budget:
    """What a user lets measurements cost.

    Attributes:
        products: Hessian-vector products of one measurement, those of all its instruments
            together; None for no bound.
        seconds: Wall-clock seconds of one measurement; None for no bound.
        share: Share of the training time that all measurements of a run together may take, above 0
            and below 1; for callbacks only. None for no bound.

    Raises:
        ArgumentError: A bound that is not positive, or a share of 1 or more.

    Example:
        >>> Budget(products=500, seconds=30).products
        500
    """

    products: int | None = None
    seconds: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        below_one = real_number("Give a share of the training time below 1.", above=0.0, below=1.0)
        check_fields(
            self,
            {
                "products": optional(whole_number(least=1), "for no bound"),
                "seconds": optional(seconds, "for no bound"),
                "share": optional(below_one, "for no bound"),
            },
        )

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def open(
        self, session: Session, on_progress: Callable[[int, int | None], None] | None = None
    ) -> Allowance:
        """Return what is left now, for the instruments of one session to spend from.

        Args:
            session: Products of its operator are spent from the allowance.
            on_progress: ``on_progress(num_products, num_converged)``, called after every product.
        """
        allowance = Allowance(
            products=self.products,
            seconds=self.seconds,
            ranks=session.ranks,
            on_progress=on_progress,
        )
        session.spend_from(allowance)
        return allowance


UNLIMITED = Budget()

a_budget = instance_of(Budget, "Give Budget(products=..., seconds=...), or None.", UNLIMITED)
"""The rule of ``budget``."""

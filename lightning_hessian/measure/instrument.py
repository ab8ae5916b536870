"""What can be measured in a session: the protocol that built-in and users' instruments follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.session import Session


@runtime_checkable
class Record(Protocol):
    """What an instrument has found; frozen.

    Example:
        >>> isinstance(Scalars({"sharpness": 2.5}), Record)
        True
    """

    def scalars(self) -> Mapping[str, float]:
        """Return the statistics by logged name, without the instrument's prefix."""

    def absent(self) -> Sequence[str]:
        """Return a sentence for each statistic that is missing, saying why."""


@runtime_checkable
class Instrument(Protocol):
    """Something to measure in a session.

    A callback asks it in this order: `check` before training; at a due validation `cost`, and
    `measure` where the budget affords it.

    Attributes:
        name: Tells instruments of one callback apart; an instrument that is given replaces the
            built-in one of the same name.
        prefix: Section of the logged names: ``<prefix>/<statistic>``.

    Example:
        >>> from lightning_hessian import SpectrumInstrument
        >>> isinstance(SpectrumInstrument(), Instrument)
        True
    """

    @property
    def name(self) -> str:
        """What the instrument is called."""

    @property
    def prefix(self) -> str:
        """Section of its logged names."""

    def check(self, model: nn.Module) -> None:
        """Raise ArgumentError where the arguments do not fit the model."""

    def cost(self, session: Session) -> int:
        """Return how many products a measurement will take, about."""

    # It returns a Record. Its annotation says Any because LightningCLI, which builds instruments
    # from YAML, takes a class for an instrument only where the annotations are literally the same.
    def measure(self, session: Session, allowance: Allowance) -> Any:
        """Return the `Record`, or an `Absent` where nothing can be said.

        All ranks call it together.
        """


@dataclass(frozen=True)
class Absent:
    """A record without statistics: why there are none.

    Attributes:
        reasons: A sentence for each.

    Example:
        >>> Absent(("The gradient is zero, so it has no direction.",)).absent()
        ('The gradient is zero, so it has no direction.',)
    """

    reasons: tuple[str, ...]

    def scalars(self) -> dict[str, float]:
        """Return no statistic."""
        return {}

    def absent(self) -> tuple[str, ...]:
        """Return the reasons."""
        return self.reasons


@dataclass(frozen=True)
class Scalars:
    """The simplest record: numbers by name.

    Attributes:
        values: Statistics by logged name, without prefix.
        missing: A sentence for each that is absent.

    Example:
        >>> Scalars({"sharpness": 2.5}).scalars()
        {'sharpness': 2.5}
    """

    values: Mapping[str, float]
    missing: Sequence[str] = ()

    def scalars(self) -> Mapping[str, float]:
        """Return the statistics by name."""
        return self.values

    def absent(self) -> Sequence[str]:
        """Return the sentences on what is missing."""
        return self.missing

"""What follows a measurement must not cost the run: schedules, loggers, figures, old state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning_hessian.linear.ranks import RankError, Ranks
from lightning_hessian.results import MeasurementError
from lightning_hessian.results.base import text_of


class Guard:
    """Takes in the exceptions of work around a measurement, and tells or raises them.

    With ``on_error="warn"`` each kind of work that fails is told once, and training goes on. With
    ``"raise"`` the first exception is kept until `settle`, where all ranks raise together: most of
    the work is rank zero's alone, and a rank that raised by itself would leave the others waiting.
    Only a rank that ``speaks`` warns.
    """

    def __init__(self, on_error: str) -> None:
        self.speaks = True
        self._raises = on_error == "raise"
        self._failure: Exception | None = None
        self._warned: set[str] = set()

    def attempt(self, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what an action returns; None where it raises. ``what`` names it in the warning."""
        try:
            return action(*arguments)
        except Exception as error:  # noqa: BLE001 - told here, or raised by `settle`
            if self._raises:
                self._failure = self._failure or error
            elif self.speaks and what not in self._warned:
                self._warned.add(what)
                warnings.warn(
                    f"Training goes on, but {what} failed: {sentence(error)}", stacklevel=4
                )
            return None

    def settle(self, ranks: Ranks) -> None:
        """Raise the exception that an attempt has left, on all ranks; all call it.

        Raises:
            Exception: That of the attempt, of a process by itself.
            RankError: The same of several.
        """
        failure, self._failure = self._failure, None
        if not self._raises:
            return
        if ranks.any(failure is not None):
            if ranks.world > 1:
                ranks.fail(failure)
            assert failure is not None
            raise failure


def named(failure: Exception | None, ranks: Ranks) -> RankError:
    """Return a failure that came unagreed as one that names the rank, the same on all ranks."""
    try:
        ranks.fail(failure)
    except RankError as agreed:
        return agreed


def sentence(error: Exception) -> str:
    """Return what an exception says, with its kind where it is not one of this package's."""
    text = text_of(error)
    if isinstance(error, (MeasurementError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"

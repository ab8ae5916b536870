"""What all records are made of, and the errors that a user of the package meets."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class MeasurementError(RuntimeError):
    """A measurement could not be made; the message names the cause and the remedy.

    Example:
        >>> import torch
        >>> from lightning_hessian import hessian_spectrum
        >>> def diverged(model, batch):
        ...     return model(batch).mean() * float("nan")
        >>> try:
        ...     hessian_spectrum(torch.nn.Linear(9, 9), diverged, [torch.ones(3, 9)])
        ... except MeasurementError as error:
        ...     print(error)
        The loss of probe batch 0 is ...
    """


class NoSecondDerivativeError(MeasurementError):
    """The loss has no second derivative: an operation of it has none, or a wrong one.

    Finite differences of gradients may serve; ``hvp="auto"`` falls back to them.

    Example:
        >>> issubclass(NoSecondDerivativeError, MeasurementError)
        True
    """


class TimeUpError(MeasurementError):
    """The seconds of a budget were over before the first product could be made."""


class ArgumentError(ValueError, TypeError):
    """An argument that cannot be used; raised where it is given, before any work.

    It is a ValueError and a TypeError at once, because to the caller it makes no difference
    whether ``"5"`` is a bad value or a bad type.

    Args:
        argument: Name of the argument, as the user typed it.
        value: What was given; shown shortened.
        remedy: One sentence that says what to give instead.

    Example:
        >>> raise ArgumentError("num_eigenvalues", "5", "Give a whole number from 1 on.")
        Traceback (most recent call last):
            ...
        lightning_hessian.results.base.ArgumentError: num_eigenvalues='5' cannot be used. Give a...
    """

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        super().__init__(f"{argument}={_shown(value)} cannot be used. {remedy}")
        self.argument, self.value, self.remedy = argument, value, remedy

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Pickle by the three arguments, which processes that read runs send one another."""
        return type(self), (self.argument, self.value, self.remedy)


def _shown(value: object) -> str:
    """Return a value in at most a few dozen characters on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # noqa: BLE001 - a repr of the user's may raise anything, as may huge integers
        return f"<{type(value).__name__}>"


def nearest(name: str, known: Sequence[str], most: int = 4) -> list[str]:
    """Return the names that look most like one that is not among them, or the first few.

    Example:
        >>> nearest("val_los", ["epoch", "val_loss", "train_loss"])
        ['val_loss', 'train_loss']
    """
    ends = [other for other in known if other.rpartition("/")[2] == name.rpartition("/")[2]]
    close = difflib.get_close_matches(name, known, n=most, cutoff=0.4)
    return list(dict.fromkeys([*ends, *close]))[:most] or list(known[:most])


def text_of(error: BaseException) -> str:
    """Return the text of an exception, also of one whose text cannot be had.

    Example:
        >>> text_of(KeyError("name")), text_of(KeyError())
        ("'name'", 'no message')
    """
    try:
        return str(error).strip() or "no message"
    except Exception:  # noqa: BLE001 - a __str__ of the user's own that raises
        return "no message (its text could not be made)"

"""What a checkpoint holds of a callback, checked before a run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_hessian.tracking.history import History


@dataclass(frozen=True)
class Progressed:
    """How far a callback was.

    Attributes:
        history: Its measurements.
        num_validations: How many validations there were.
        last_step: How many optimizer steps there were at the last whole measurement, if any.
        identity: Of the fit.
    """

    history: History
    num_validations: int
    last_step: int | None
    identity: str

    @classmethod
    def checked(cls, state: Mapping[str, Any], identity: str) -> Progressed:
        """Return what the state of a checkpoint says.

        Args:
            state: What `torch.load` has read.
            identity: That of the fit, where the state has none.

        Raises:
            ValueError: Something in it cannot be.
        """
        history = History.checked(state["history"])
        number, last_step = state["num_validations"], state["last_step"]
        if not _is_count(number):
            raise ValueError(f"num_validations={number!r} is no count.")
        if last_step is not None and not _is_count(last_step):
            raise ValueError(f"last_step={last_step!r} is no count.")
        identity = state.get("identity", identity)
        if not isinstance(identity, str):
            raise ValueError(f"identity={identity!r} is no text.")
        return cls(history, number, last_step, identity)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

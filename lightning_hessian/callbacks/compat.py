"""A Callback that is at home in the Trainer of either Lightning package.

``lightning`` and ``pytorch_lightning`` are the same code under two names, with two Callback
classes. Importing the second as a side effect would redirect the first one's log messages, so it
becomes a base class only once the user has imported it: when this module is imported (by then
``LightningCLI`` has), or when a callback is made.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.callbacks import Callback as LightningCallback


class Callback(LightningCallback):
    """Inherits from the Callback of every Lightning package in use."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
        """Looks once more for packages in use."""
        _join_packages_in_use()
        return super().__new__(cls)


def _join_packages_in_use() -> None:
    other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    if other is not None and not issubclass(Callback, other):
        Callback.__bases__ = (*Callback.__bases__, other)


_join_packages_in_use()

"""A Callback that is at home in the Trainer of either Lightning package.

``lightning`` and ``pytorch_lightning`` are the same code under two names, with two Callback
classes. One that inherits both serves both, whichever is imported first.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback as LightningCallback
from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING or importlib.util.find_spec("pytorch_lightning") is None:
    Callback = LightningCallback
else:
    from lightning_utilities.core import rank_zero

    log = rank_zero.log
    from pytorch_lightning.callbacks import Callback as PytorchLightningCallback

    rank_zero.log = log  # which the second package takes over from the first

    class Callback(LightningCallback, PytorchLightningCallback):
        """Inherits from the Callback of both packages."""


def tell(message: str) -> None:
    """Print a line through Lightning's own logger, on rank zero."""
    rank_zero_info(message)


__all__ = ["Callback", "tell"]

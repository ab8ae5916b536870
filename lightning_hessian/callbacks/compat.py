"""The Callback base of every Lightning that is installed.

``lightning`` and ``pytorch_lightning`` are the same code under two names, with two Callback
classes. One that inherits both is at home in either Trainer.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback as LightningCallback

if TYPE_CHECKING or importlib.util.find_spec("pytorch_lightning") is None:
    Callback = LightningCallback
else:
    from pytorch_lightning.callbacks import Callback as PytorchLightningCallback

    class Callback(LightningCallback, PytorchLightningCallback):
        """A callback for the Trainer of either package."""


__all__ = ["Callback"]

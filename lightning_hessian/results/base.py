"""What all records are made of, and the error that a measurement raises."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class MeasurementError(RuntimeError):
    """A measurement could not be made; the message names the cause and the remedy."""

"""Kinks on which rounding decides: where two right ways to a product differ by more than rounding.

The second derivative of a rectifier, or of a maximum, jumps. A linearisation computes activations
by other kernels than torch does in the plain layout, so they differ by rounding; of the millions
that a batch of images has, one now and then lies so near a kink that it falls to the other side.
Of LeNet as initialised, on 1000 images of noise in float32, products then differ by 3e-4 to 2e-3,
for about every second seed, and either may be the one that float64 agrees with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_hessian.operators.engines import Product, autograd
from lightning_hessian.operators.linearize.decompose import WrittenOut
from lightning_hessian.operators.linearize.layout import LaidOut, WrittenViewError
from lightning_hessian.probe.objective import Objective

MOST_APART = 0.1
"""How far apart, relative, kinks may set two products; beyond it another engine is safer."""


def recompute_alike(objective: Objective, index: int) -> Product:
    """Return a product by double backward with the activations of a linearisation.

    The derivatives are autograd's own, as in `recompute`: only on which side of a kink an
    activation lies is decided in the same way.
    """

    def product(tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        with WrittenOut():
            try:
                with LaidOut():
                    return autograd(objective, index)(tangents)
            except WrittenViewError:  # then the linearisation is in the plain layout, too
                objective.is_written()  # puts back what the pass has written to
                return autograd(objective, index)(tangents)

    return product

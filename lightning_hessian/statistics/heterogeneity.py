"""How different the spectra of the diagonal blocks are: Jensen-Shannon distances.

HBS, implication I: the spectra of a Transformer's blocks differ much, those of a CNN's little,
and Adam beats SGD by far on the first alone (Zhang et al., NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import FloatArray, SpectralDensity

_LINEAR_SHARE = 1e-2
_WIDTH = 1.0
"""Finer ones tell a CNN from a Transformer no better, and see the noise of 10 Lanczos steps."""

_POINTS_PER_WIDTH = 4


def jensen_shannon_distances(probabilities: ArrayLike) -> FloatArray:
    """Return the Jensen-Shannon distance between every two of B distributions.

    The root of the mean Kullback-Leibler divergence, in bits, from the two to their mean: a
    metric from 0 (equal) to 1 (nowhere both positive).

    Rows [B, G] are divided by their sums.

    Source: Lin 1991; Endres and Schindelin 2003; `scipy.spatial.distance.jensenshannon`.

    Example:
        >>> jensen_shannon_distances([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        array([[0., 1., 1.],
               [1., 0., 0.],
               [1., 0., 0.]])
    """
    from scipy.spatial.distance import pdist, squareform

    # NaN where rounding makes the divergence of two equal rows negative.
    distances = np.nan_to_num(pdist(probabilities, "jensenshannon")) / np.sqrt(np.log(2))
    return np.asarray(squareform(distances))


def heterogeneity(densities: Sequence[SpectralDensity]) -> FloatArray:
    """Return the Jensen-Shannon distance between the spectral densities of every two blocks.

    Eigenvalues of blocks differ by orders of magnitude, and on a linear axis most of them would
    be one peak at zero. So the densities are compared over t = asinh(lambda / unit), which is
    linear below the unit and logarithmic, with both signs, above; there each node is broadened to
    a Gaussian of width 1, a factor of e. The unit, below which eigenvalues count as zero, is 1e-2
    of the median over blocks of the largest absolute node. So the result does not change when the
    loss is multiplied by a number.

    Args:
        densities: B of them.

    Returns:
        float64 [B, B] between 0 and 1, symmetric with zeros on the diagonal.

    Raises:
        ValueError: No densities.

    Source: HBS, implication I; Zhang et al., NeurIPS 2024, figure 4.

    Example:
        >>> import numpy as np
        >>> flat, steep = (SpectralDensity(np.array([0.0, top]), np.array([0.5, 0.5]), 2, 2, True)
        ...                for top in (1.0, 100.0))
        >>> heterogeneity([flat, flat, steep]).round(2)
        array([[0.  , 0.  , 0.69],
               [0.  , 0.  , 0.69],
               [0.69, 0.69, 0.  ]])
    """
    return jensen_shannon_distances(transformed_densities(densities)[1])


def transformed_densities(
    densities: Sequence[SpectralDensity],
) -> tuple[FloatArray, FloatArray, float]:
    """Return the densities over t = asinh(lambda / unit) on one grid, as `heterogeneity` does.

    Returns:
        The grid of t, float64 [G]; the densities, float64 [B, G]; and the unit.

    Raises:
        ValueError: No densities.
    """
    if not densities:
        raise ValueError("There is no density to compare.")
    largest = [float(np.abs(density.nodes).max()) for density in densities]
    positive = [size for size in largest if size > 0]
    unit = _LINEAR_SHARE * float(np.median(positive)) if positive else 1.0
    transformed = [np.arcsinh(density.nodes / unit) for density in densities]
    low = min(float(nodes.min()) for nodes in transformed) - 4 * _WIDTH
    high = max(float(nodes.max()) for nodes in transformed) + 4 * _WIDTH
    grid = np.linspace(low, high, 1 + int(np.ceil((high - low) / _WIDTH * _POINTS_PER_WIDTH)))
    rows = [
        replace(density, nodes=nodes).on_grid(grid, _WIDTH)
        for nodes, density in zip(transformed, densities, strict=True)
    ]
    return grid, np.stack(rows), unit

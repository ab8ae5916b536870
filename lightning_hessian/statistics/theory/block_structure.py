"""What theory says block structures should be: closed-form Hessians, limits, limiting spectra.

Inputs X are [N, d], a sample in each row (HBS writes them as columns). W [m, d] and V [C, m] (or
[C, d] without a hidden layer) are weights, flattened row by row, W before V: a block for each
hidden neuron w_i and each class v_i. sigma is ReLU, whose derivative at 0 counts as 0.

HBS prints the squared loss without the factor 1/2 that its Hessians imply: here the loss is
norm(f(x) - y)^2 / 2, averaged over samples, and the Hessians are those printed.

Source: HBS is Dong, Zhang et al., "Towards Quantifying the Hessian Structure of Neural Networks".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hessian.results import ArgumentError, FloatArray
from lightning_hessian.results.arguments import checked, real_number, seed_number, whole_number
from lightning_hessian.results.array_arguments import real_matrix, real_values

_positive = real_number("Give a positive number.", above=0.0)

_RULES = {
    "inputs": real_matrix,
    "targets": real_matrix,
    "labels": real_values,
    "W": real_matrix,
    "V": real_matrix,
    "x": real_values,
    "gamma": _positive,
    "ratio": _positive,
    "variance": _positive,
    "num_classes": whole_number(least=2, most=100_000),
    "seed": seed_number,
}


# Closed-form Hessians -----------------------------------------------------------------------------


@checked({**_RULES, "num_classes": whole_number(least=1, most=10_000)})
def linear_mse_hessian(inputs: ArrayLike, num_classes: int) -> FloatArray:
    """Return the Hessian of a linear model V x with squared loss, [C d, C d] (HBS case 1).

    Block (i, i) is the mean of x x^T, all others are zero, for any targets and weights.

    Args:
        inputs: X, [N, d].
        num_classes: C.

    Example:
        >>> linear_mse_hessian([[1.0], [3.0]], 2)
        array([[5., 0.],
               [0., 5.]])
    """
    x = _matrix(inputs)
    return np.kron(np.eye(num_classes), x.T @ x / len(x))


@checked(_RULES)
def linear_cross_entropy_hessian(inputs: ArrayLike, V: ArrayLike) -> FloatArray:
    """Return the Hessian of a linear model V x with cross-entropy, [C d, C d] (HBS case 2).

    Block (i, j) is the mean of p_i (delta_ij - p_j) x x^T, with p = softmax(V x), for any labels.

    Args:
        inputs: X, [N, d].
        V: [C, d].

    Example:
        >>> linear_cross_entropy_hessian([[2.0]], [[0.0], [0.0]])
        array([[ 1., -1.],
               [-1.,  1.]])
    """
    x, v = _columns_fit(inputs=inputs, V=V)
    p = _softmax(x @ v.T)
    (count, d), c = x.shape, len(v)
    blocks = np.einsum("na,nc,nk,nl->akcl", -p, p, x, x, optimize=True)
    for i in range(c):
        blocks[i, :, i] += (x * p[:, i : i + 1]).T @ x
    found: FloatArray = blocks.reshape(c * d, c * d) / count
    return found


@checked(_RULES)
def hidden_mse_hessian(
    inputs: ArrayLike, targets: ArrayLike, W: ArrayLike, V: ArrayLike
) -> FloatArray:
    """Return the Hessian of V sigma(W x) with squared loss, [m d + C m, m d + C m] (HBS case 3).

    Args:
        inputs: X, [N, d].
        targets: Y, [N, C].
        W: Hidden weights, [m, d].
        V: Output weights, [C, m].

    Example:
        >>> hidden_mse_hessian([[1.0]], [[0.0]], [[2.0]], [[3.0]])  # loss (v w)^2 / 2
        array([[ 9., 12.],
               [12.,  4.]])
    """
    x, w = _columns_fit(inputs=inputs, W=W)
    y, v = _matrix(targets), _matrix(V)
    _require_shape("V", v, (len(v), len(w)))
    _require_shape("targets", y, (len(x), len(v)))
    hidden = np.maximum(x @ w.T, 0)
    error = hidden @ v.T - y
    return _hidden_hessian(x, w, v, error, (np.ones_like(error), np.zeros_like(error)))


@checked(_RULES)
def hidden_cross_entropy_hessian(
    inputs: ArrayLike, labels: ArrayLike, W: ArrayLike, V: ArrayLike
) -> FloatArray:
    """Return the Hessian of V sigma(W x) with cross-entropy, [m d + C m, m d + C m] (HBS case 4).

    The block H_wv holds the errors p - y, which vanish in training: the dynamic force.

    Args:
        inputs: X, [N, d].
        labels: Classes 0..C-1, [N].
        W: Hidden weights, [m, d].
        V: Output weights, [C, m].

    Example:
        >>> hidden_cross_entropy_hessian([[1.0]], [0], [[2.0]], [[0.0], [0.0]]).round(2)
        array([[ 0. , -0.5,  0.5],
               [-0.5,  1. , -1. ],
               [ 0.5, -1. ,  1. ]])
    """
    (x, w), v = _columns_fit(inputs=inputs, W=W), _matrix(V)
    _require_shape("V", v, (len(v), len(w)))
    classes = np.asarray(labels)
    _require_shape("labels", classes, (len(x),))
    if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= len(v):
        raise ArgumentError("labels", labels, f"Give whole numbers from 0 to {len(v) - 1}.")
    p = _softmax(np.maximum(x @ w.T, 0) @ v.T)
    error = p.copy()
    error[np.arange(len(x)), classes] -= 1
    return _hidden_hessian(x, w, v, error, (p, p))


def _hidden_hessian(
    x: FloatArray,
    w: FloatArray,
    v: FloatArray,
    error: FloatArray,
    curvature: tuple[FloatArray, FloatArray],
) -> FloatArray:
    """Return the Hessian from dL/df [N, C] and d2L/df2 of each sample.

    With ReLU the second derivative of f by W is zero, so W meets itself through f alone
    (Gauss-Newton); V meets W also where both stand in one product, which leaves the error.

    d2L/df2 is diag(a) - b b^T, given as a and b, both [N, C]. All C x C matrices of the samples
    would take 10 GB at HBS's own size (N = 5000, C = 500); this takes little beside the result.
    """
    (count, d), m, c = x.shape, len(w), len(v)
    a, b = curvature
    active = (x @ w.T > 0).astype(np.float64)
    hidden = np.maximum(x @ w.T, 0)
    mean = b @ v  # [N, m]
    found = np.empty((m * d + c * m, m * d + c * m))
    rows = [slice(i * d, (i + 1) * d) for i in range(m)]  # of w_i
    columns = [slice(m * d + i, None, m) for i in range(m)]  # of v_1i to v_Ci
    for i in range(m):
        outputs = a * v[:, i] - mean[:, i : i + 1] * b  # d2L/df2 times how f moves with w_i x
        for j in range(m):
            between = active[:, i] * active[:, j] * (outputs @ v[:, j])
            found[rows[i], rows[j]] = (x * between[:, None]).T @ x
            found[rows[i], columns[j]] = (x * (active[:, i] * hidden[:, j])[:, None]).T @ outputs
            both = (hidden[:, i] * hidden[:, j])[:, None]
            found[columns[i], columns[j]] = np.diag((a * both).sum(0)) - (b * both).T @ b
        found[rows[i], columns[i]] += (x * active[:, i : i + 1]).T @ error
    found[m * d :, : m * d] = found[: m * d, m * d :].T
    found /= count
    return found


# Static force: many classes -----------------------------------------------------------------------


@checked(_RULES)
def class_ratio_limit(gamma: float) -> float:
    """Return the limit of C^2 norm_F(H_ij)^2 / norm_F(H_ii)^2, (gamma e^2 + 1) / (gamma e + 1).

    Assumes a linear model with cross-entropy, inputs i.i.d. N(0, 1), weights i.i.d. N(0, 1/d),
    d and N to infinity with d / N = gamma, then C to infinity (HBS theorem 1, eq. 20).

    Raises:
        ValueError: gamma is not positive.

    Example:
        >>> round(class_ratio_limit(1.0), 3)
        2.256
    """
    return (gamma * math.e**2 + 1) / (gamma * math.e + 1)


@checked(_RULES)
def class_ratio(gamma: float, num_classes: int, *, seed: int = 0) -> float:
    """Return the limit of norm_F(H_ij)^2 / norm_F(H_ii)^2 at a finite number of classes.

    The assumptions are those of `class_ratio_limit`, but for C. There the weights Lambda of the
    samples become independent of X, and norm_F(X Lambda X^T / N)^2 / d tends to
    gamma E[Lambda^2] + E[Lambda]^2, with Lambda = p_i p_j or p_i (1 - p_i) and p = softmax(z),
    z i.i.d. N(0, 1) (HBS theorem 1 and its proof). The expectations are simulated with at least
    two million numbers; their error is about one percent.

    Args:
        gamma: d / N.
        num_classes: C, at least 2.
        seed: Of the simulation.

    Raises:
        ValueError: gamma is not positive, or there are fewer than 2 classes.

    Example:
        >>> round(class_ratio(1.0, 2), 3)  # p_1 p_2 = p_1 (1 - p_1) for two classes
        1.0
    """
    rng = np.random.default_rng(seed)
    count = max(1000, 2_000_000 // num_classes)
    sums = np.zeros(4)  # of p_i p_j, its square, p_i (1 - p_i), and its square
    for start in range(0, count, 1000):
        p = _softmax(rng.standard_normal((min(1000, count - start), num_classes)))
        power_2, power_4, diagonal = (p**2).sum(1), (p**4).sum(1), p * (1 - p)
        sums += (
            (1 - power_2).sum(),
            (power_2**2 - power_4).sum(),
            diagonal.sum(),
            (diagonal**2).sum(),
        )
    off, off_2 = sums[:2] / (count * num_classes * (num_classes - 1))
    on, on_2 = sums[2:] / (count * num_classes)
    return float((gamma * off_2 + off**2) / (gamma * on_2 + on**2))


@checked(_RULES)
def hidden_ratio_mse(gamma: float, num_classes: int) -> float:
    """Return the limit of E norm_F(H_wiwj)^2 / E norm_F(H_wiwi)^2 with squared loss.

    (gamma / 4 + 1 / 16) / ((gamma / 2 + 1 / 4) (C + 2)): the sums over classes are those of
    products of normal weights, and the gates of two neurons are open together for a quarter of
    the samples. Assumes one hidden layer, inputs i.i.d. N(0, 1), weights i.i.d. normal, d and N
    to infinity with d / N = gamma (HBS case 3; theorem 2 gives the rate 1 / C).

    Raises:
        ValueError: gamma is not positive.

    Example:
        >>> round(hidden_ratio_mse(1.0, 10), 4)
        0.0347
    """
    return (gamma / 4 + 1 / 16) / ((gamma / 2 + 1 / 4) * (num_classes + 2))


# Limiting spectra ---------------------------------------------------------------------------------


@checked(_RULES)
def marchenko_pastur(x: ArrayLike, ratio: float, variance: float = 1.0) -> FloatArray:
    """Return the limiting density of the eigenvalues of X X^T / n, X [d, n] with i.i.d. entries.

    sqrt((b - x)(x - a)) / (2 pi variance ratio x) between a, b = variance (1 -+ sqrt(ratio))^2.
    It has mass 1, or 1 / ratio where ratio > 1: the rest, 1 - 1 / ratio, lies at exactly 0.
    Assumes mean zero, d and n to infinity with d / n = ratio (Marchenko and Pastur 1967; HBS).

    Args:
        x: Where, any shape.
        ratio: d / n.
        variance: Of the entries.

    Raises:
        ValueError: The ratio or the variance is not positive.

    Example:
        >>> marchenko_pastur([0.1, 1.0, 5.0], 1.0).round(3)
        array([0.994, 0.276, 0.   ])
    """
    at = np.asarray(x, dtype=np.float64)
    low, high = marchenko_pastur_edges(ratio, variance)
    inside = (at > max(low, 0)) & (at < high)
    safe = np.where(inside, at, 1.0)
    root = np.sqrt(np.clip((high - safe) * (safe - low), 0, None))
    return np.where(inside, root / (2 * np.pi * variance * ratio * safe), 0.0)


@checked(_RULES)
def marchenko_pastur_edges(ratio: float, variance: float = 1.0) -> tuple[float, float]:
    """Return the ends of the support of `marchenko_pastur`.

    Example:
        >>> marchenko_pastur_edges(0.25)
        (0.25, 2.25)
    """
    return variance * (1 - math.sqrt(ratio)) ** 2, variance * (1 + math.sqrt(ratio)) ** 2


@checked(_RULES)
def semicircle(x: ArrayLike, variance: float = 1.0) -> FloatArray:
    """Return the limiting density of the eigenvalues of a Wigner matrix over sqrt(n).

    sqrt(4 variance - x^2) / (2 pi variance), zero outside. Assumes a symmetric matrix with
    independent entries of mean zero and the given variance (Wigner 1955; HBS).

    Args:
        x: Where, any shape.
        variance: Of the entries off the diagonal.

    Raises:
        ValueError: The variance is not positive.

    Example:
        >>> semicircle([0.0, 2.0]).round(4)
        array([0.3183, 0.    ])
    """
    at = np.asarray(x, dtype=np.float64)
    return np.sqrt(np.clip(4 * variance - at**2, 0, None)) / (2 * np.pi * variance)


def _matrix(values: ArrayLike) -> FloatArray:
    matrix: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    return matrix


def _columns_fit(**matrices: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return two matrices, checked to have as many columns."""
    (_, first), (name, second) = matrices.items()
    one, other = _matrix(first), _matrix(second)
    _require_shape(name, other, (len(other), one.shape[1]))
    return one, other


def _require_shape(name: str, array: NDArray[np.float64], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ArgumentError(name, array, f"Its shape is {array.shape}; give {shape}.")


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    found: FloatArray = exponentials / exponentials.sum(1, keepdims=True)
    return found

"""What an argument of numbers in an array may be; rules as those of `arguments`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_hessian.results.arguments import as_float
from lightning_hessian.results.base import ArgumentError


def real_values(name: str, value: Any) -> Any:
    """Check an array of any shape: real numbers, no words, no booleans; return NumPy's."""
    remedy = "Give real numbers: a list, an array or a tensor on the CPU."
    if getattr(value, "requires_grad", False) is True:
        remedy = "Give a tensor without gradient: values.detach().cpu()."
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(name, value, remedy) from error
    if array.dtype == object and all(as_float(each) is not None for each in array.flat):
        return array.astype(np.float64)  # fractions and decimals
    if array.dtype.kind not in "iuf" and array.size:
        raise ArgumentError(name, value, remedy)
    return array


def finite_values(name: str, value: Any) -> Any:
    """Check an array of finite real numbers, of any shape."""
    array = real_values(name, value)
    num_bad = int(np.count_nonzero(~np.isfinite(array)))
    if num_bad:
        raise ArgumentError(
            name,
            value,
            f"{num_bad} of the {array.size} values are NaN or infinite, so their rank is unknown; "
            "leave them out, or mend what made them.",
        )
    return array


def real_matrix(name: str, value: Any) -> Any:
    """Check a matrix: finite real numbers in two dimensions, neither empty."""
    matrix = finite_values(name, value)
    if matrix.ndim != 2 or not matrix.size:
        raise ArgumentError(name, value, f"Its shape is {matrix.shape}; give a matrix, row by row.")
    return matrix

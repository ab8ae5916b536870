"""Spectra as compact texts: what a run's history holds of them, and how they are read back.

A table for each step would be an artifact for each step. A text of 10 bytes for each eigenvalue
stands in the history like a number, and costs a thousand eigenvalues at a hundred measurements
about a megabyte.
"""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hessian.results import FloatArray

_HEADER = struct.Struct("<2sBBI")  # mark, version, whether residuals follow, K
_MARK, _VERSION = b"LH", 1


@dataclass(frozen=True, eq=False)
class StoredSpectrum:
    """Eigenvalues as they were logged, to the seven digits of float32.

    Attributes:
        eigenvalues: float64 [K], descending.
        residuals: Bounds on their residual norms, float64 [K], or None where none were stored.
        converged: Which had converged, bool [K].
    """

    eigenvalues: FloatArray
    residuals: FloatArray | None
    converged: NDArray[np.bool_]

    @property
    def leading(self) -> FloatArray:
        """The eigenvalues before the first that has not converged or is not positive."""
        usable = self.converged & (self.eigenvalues > 0)
        return self.eigenvalues[: len(usable) if usable.all() else int(usable.argmin())]


def encode_spectrum(
    eigenvalues: ArrayLike, residuals: ArrayLike | None = None, converged: ArrayLike | None = None
) -> str:
    """Return a spectrum as text: base64 of a header of 8 bytes, float32 values and flags.

    Little-endian: the mark ``LH``, version 1, a byte that is 1 if residuals follow, K as uint32;
    K eigenvalues as float32; K residuals as float32, if any; K flags, bit by bit.

    Args:
        eigenvalues: Real [K].
        residuals: Bounds on their residual norms [K].
        converged: Which have converged [K]; by default all.

    Raises:
        ValueError: The lengths differ.

    Example:
        >>> decode_spectrum(encode_spectrum([4.0, 2.0, 1.0])).eigenvalues
        array([4., 2., 1.])
    """
    values = np.asarray(eigenvalues, dtype=np.float64).ravel()
    flags = np.ones(len(values), bool) if converged is None else np.asarray(converged, bool)
    bounds = None if residuals is None else np.asarray(residuals, dtype=np.float64)
    if len(flags) != len(values) or (bounds is not None and len(bounds) != len(values)):
        raise ValueError(f"{len(values)} eigenvalues need as many residuals and flags.")
    data = _HEADER.pack(_MARK, _VERSION, bounds is not None, len(values))
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which the reader sees
        data += values.astype("<f4").tobytes()
        if bounds is not None:
            data += bounds.astype("<f4").tobytes()
    return base64.b64encode(data + np.packbits(flags).tobytes()).decode("ascii")


def decode_spectrum(text: str) -> StoredSpectrum:
    """Return the spectrum that `encode_spectrum` made the text of.

    Raises:
        ValueError: It is not such a text, or one of a later version.
    """
    try:
        data = base64.b64decode(text, validate=True)
        mark, version, has_residuals, count = _HEADER.unpack_from(data)
    except (binascii.Error, struct.error, TypeError, ValueError) as error:
        raise ValueError("this is no spectrum as lightning_hessian logs it.") from error
    if mark != _MARK or version != _VERSION:
        raise ValueError(
            "this is no spectrum as lightning_hessian logs it, or one of a later version; update "
            "lightning_hessian."
        )
    length = 4 * count
    expected = _HEADER.size + length * (1 + has_residuals) + (count + 7) // 8
    if len(data) != expected:
        raise ValueError(
            f"the spectrum is cut short: {len(data)} of {expected} bytes; log it anew."
        )
    begin = _HEADER.size
    values = np.frombuffer(data, "<f4", count, begin).astype(np.float64)
    residuals = None
    if has_residuals:
        begin += length
        residuals = np.frombuffer(data, "<f4", count, begin).astype(np.float64)
    flags = np.frombuffer(data, np.uint8, offset=begin + length)
    return StoredSpectrum(values, residuals, np.unpackbits(flags, count=count).astype(bool))

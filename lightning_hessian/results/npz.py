"""NumPy's NPZ files read within bounds: no pickles, no compression, no size but the file's own."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from lightning_hessian.results.outside import UnreadableFileError, open_regular, unreadable

_MEMBERS = 64
"""Our files have eight arrays at most."""


def read_npz(
    path: Path, only: Iterable[str] | None = None, *, most: int | None = None, remedy: str = ""
) -> dict[str, Any]:
    """Return the arrays of a file that `numpy.savez` wrote.

    An uncompressed member cannot hold more than the file has bytes. So no header is believed that
    claims anything else, and memory stays within the size of the file. ``only`` names the arrays
    that are read, all by default; ``most`` bounds the bytes of the file.

    Raises:
        UnreadableFileError: It is no such file, damaged, or too large.
        OSError: It cannot be opened.
    """
    wanted = None if only is None else set(only)
    with (
        open_regular(path, most) as file,
        unreadable(path, remedy),
        zipfile.ZipFile(file) as archive,
    ):
        require_stored(archive, path)
        names = [_name(info) for info in archive.infolist()]
        if len(names) > _MEMBERS or len(set(names)) < len(names):
            raise UnreadableFileError(f"{path} is damaged (its list of arrays). {remedy}".rstrip())
        chosen = [n for n in archive.infolist() if wanted is None or _name(n) in wanted]
        found = {}
        for info in chosen:
            with archive.open(info) as member:
                found[_name(info)] = _array(member, info.file_size)
        return found


def _name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def require_stored(archive: zipfile.ZipFile, path: object) -> None:
    """Check that no member of an archive unpacks to more bytes than it has there."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnreadableFileError(
                f"{path} has a compressed part, which neither NumPy nor torch writes: it may "
                "unpack to any size."
            )


def _array(member: IO[bytes], size: int) -> Any:
    """Return the array of one member; the data must have the size that its header says."""
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran, dtype = read(member)
    if dtype.kind not in "biufU":
        raise ValueError(f"an array of {dtype}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ValueError("an array whose size is not that of its header")
    array = np.empty(shape, dtype, order="F" if fortran else "C")
    flat = array.reshape(-1, order="A").view(np.uint8) if array.size else np.empty(0, np.uint8)
    data = flat.data
    while data:
        count = member.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        data = data[count:]
    member.read(1)  # its end, where the checksum is compared
    return array

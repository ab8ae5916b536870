"""What an argument that names a place on the disk may be; rules as those of `arguments`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_hessian.results.arguments import Rule
from lightning_hessian.results.base import ArgumentError


def path_name(name: str, value: Any) -> Any:
    """Check a path, of a file or folder that may or may not exist."""
    if isinstance(value, (str, os.PathLike)):
        place = os.fspath(value)
        # Path("") is ".", which a forgotten variable should not stand for.
        if isinstance(place, str) and place.strip() and "\0" not in place:
            if max(map(len, map(os.fsencode, place.split(os.sep)))) > 255:
                raise ArgumentError(name, value, "A part of this path is longer than 255 bytes.")
            return value
    raise ArgumentError(name, value, "Give the path of a file or folder.")


def file_to_write(name: str, value: Any) -> Any:
    """Check a file that will be written: no folder, and in a folder that exists."""
    path_name(name, value)
    folder = os.path.dirname(os.path.abspath(value))
    if os.path.isdir(value):
        raise ArgumentError(name, value, "It is a folder; give the path of a file.")
    if not os.path.isdir(folder):
        raise ArgumentError(name, value, f"There is no folder {folder!r}; make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):  # more than os.access knows: a full disk, root
            pass
    except OSError as error:
        remedy = f"Nothing can be written to {folder!r} ({error.strerror}); give another path."
        raise ArgumentError(name, value, remedy) from error
    return value


def existing_folder(name: str, value: Any) -> Any:
    """Check a folder that must be there and can be written to."""
    path_name(name, value)
    if not os.path.isdir(value):
        raise ArgumentError(name, value, f"There is no folder {os.fspath(value)!r}; make it first.")
    if not os.access(value, os.W_OK):
        raise ArgumentError(name, value, "Nothing can be written to this folder; give another.")
    return value


def paths(remedy: str) -> Rule:
    """Return the rule of a path or a sequence of paths; returns a list."""

    def check(name: str, value: Any) -> list[Any]:
        single = isinstance(value, (str, bytes, os.PathLike, Mapping))
        found = list(value) if isinstance(value, Iterable) and not single else [value]
        try:
            if found:
                return [path_name(name, one) for one in found]
        except ArgumentError:
            pass
        raise ArgumentError(name, value, remedy)

    return check

"""Where results are written to: proven before the work begins, then written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_hessian.results.base import ArgumentError
from lightning_hessian.results.outside import reason


def check_folder(folder: Path, argument: str = "--out", files: Iterable[str] = ()) -> None:
    """Check that files can be written to a folder, by writing one; nothing stays behind.

    The folder need not exist yet. The files may, but not as folders or locked.
    """
    made: list[Path] = []
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir(exist_ok=True)
                made.append(part)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in files:
            _check_existing(folder / name)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            argument, str(folder), f"Give a folder that can be written to ({reason(error)})."
        ) from error
    finally:
        for part in reversed(made):
            part.rmdir()


def check_file(file: Path, argument: str) -> None:
    """Check that a file can be written, with the folders around it."""
    try:
        check_folder(file.parent, argument, [file.name])
    except ArgumentError as error:
        raise ArgumentError(
            argument,
            str(file),
            f"Give a file that can be written ({reason(error.__cause__ or error)}).",
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Return a block that writes a file as a whole or not at all; nobody ever reads half of it.

    What stands there stays until the new one is complete and on the disk.
    """
    part = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_existing(file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"{file} is read-only")
    if len(os.fsencode(file.name)) > 255:
        raise OSError(f"the name {file.name[:20]}... is too long")

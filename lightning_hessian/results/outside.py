"""What comes from outside is data: files are opened, parsed and named within the bounds.

Only regular files are opened, and only inside the folder that was meant. Whatever a parser raises,
the reader's caller sees `UnreadableFileError` (or `OSError`), and can leave that file out by name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lightning_hessian.results import bounds

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_LARGEST = 10**bounds.DIGITS


class UnreadableFileError(ValueError):
    """A file from outside cannot be read; the message names the file and the reason."""


@contextmanager
def unreadable(what: object, remedy: str = "") -> Iterator[None]:
    """Turn every exception that a parser raises in the block into `UnreadableFileError`.

    Parsers promise little about what they raise on damaged input: a zip file alone can end in
    eight kinds of errors. What names its file or its cause itself passes: an `OSError` on a file, a
    server that does not answer, a package that is missing.
    """
    try:
        yield
    except (UnreadableFileError, ModuleNotFoundError, ConnectionError):
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise UnreadableFileError(_sentence(what, error, remedy)) from error
    except Exception as error:
        raise UnreadableFileError(_sentence(what, error, remedy)) from error


def _sentence(what: object, error: BaseException, remedy: str) -> str:
    return f"{printable(str(what))} is damaged ({reason(error)}). {remedy}".rstrip()


def reason(error: BaseException) -> str:
    """Return the first line of what an exception says, with its kind where that says more.

    Example:
        >>> reason(EOFError()), reason(ValueError("no number")), reason(KeyError("step"))
        ('EOFError', 'no number', "KeyError: 'step'")
    """
    try:
        text = next(iter(str(error).strip().splitlines()), "")
    except Exception as other:  # noqa: BLE001 - its own text raises
        text = f"whose text raises {type(other).__name__}"
    kind = type(error).__name__
    plain = isinstance(error, (ValueError, OSError)) and text
    return printable(text if plain else f"{kind}: {text}".removesuffix(": "), 200)


def printable(text: str, most: int = 1000) -> str:
    r"""Return a text that any file and terminal takes: no controls, no lone surrogates, bounded.

    Example:
        >>> printable("a\x1b[2J\ud800b"), printable("n" * 300, 5)
        ('a�[2J�b', 'nnnn…')
    """
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut if cut.isascii() and cut.isprintable() else _UNPRINTABLE.sub("\ufffd", cut)


def encodable(text: str) -> str:
    """Return a text without lone surrogates, which UTF-8 cannot hold."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def inside(file: Path, folder: Path) -> None:
    """Check that a file lies in a folder, symbolic links followed."""
    where = os.path.realpath(file)
    root = os.path.realpath(folder)
    if os.path.commonpath([root, where]) != root:
        raise UnreadableFileError(
            f"{printable(str(file))} is a link out of its folder, to {printable(where)}, and is "
            "not followed. Name that file itself."
        )


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a regular file of at most so many bytes; symbolic links are followed.

    A pipe, device, socket or folder is not even opened.

    Raises:
        UnreadableFileError: It is no regular file, or too large.
        OSError: It cannot be opened.
    """
    name = printable(str(path))
    try:
        _require_regular(os.stat(path), name)
        # It may have been exchanged since. Without O_NONBLOCK opening a pipe would wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except UnreadableFileError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise UnreadableFileError(f"{name} is no name of a file.") from error
    file = os.fdopen(descriptor, "rb")
    try:
        found = os.fstat(descriptor)
        _require_regular(found, name)
        if most is not None and found.st_size > most:
            raise UnreadableFileError(
                f"{name} has {found.st_size} bytes, more than the {most} that are read."
            )
    except BaseException:
        file.close()
        raise
    return file


def _require_regular(found: os.stat_result, name: str) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    kind = kinds.get(stat.S_IFMT(found.st_mode), "something else")
    raise UnreadableFileError(f"{name} is {kind}, not a regular file, and is not read.")


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        UnreadableFileError: It is no regular file, or larger than ``most`` bytes.
        OSError: It cannot be read.
    """
    with open_regular(path, most) as file:
        data = file.read(most + 1)  # files in /proc say 0 bytes, and a live file grows
    if len(data) > most:
        raise UnreadableFileError(f"{printable(str(path))} has more than {most} bytes.")
    return data


def parse_json(text: str) -> Any:
    """Return the value of a JSON text within the bounds on size, depth and digits.

    NaN and Infinity are read, as `json` does.

    Raises:
        ValueError: It is not JSON, or beyond a bound.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        ValueError: it is nested deeper than 64
    """
    if len(text) > bounds.JSON_BYTES:
        raise ValueError(f"it is longer than {bounds.JSON_BYTES} characters")
    # Few brackets cannot be deep, and counting them costs less than a hundredth of parsing.
    may_be_deep = text.count("[") + text.count("{") > bounds.DEPTH
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {bounds.DEPTH}") from error
    if may_be_deep and isinstance(value, (dict, list)) and _is_deep(value):
        raise ValueError(f"it is nested deeper than {bounds.DEPTH}")
    return value


def _is_deep(value: Any) -> bool:
    """Whether containers are nested beyond the bound; level by level, without recursion."""
    level = [value]
    for _ in range(bounds.DEPTH):
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


def check_integer(value: int) -> int:
    """Return a whole number that float64 can hold, or raise ValueError."""
    if not -_LARGEST < value < _LARGEST:
        raise ValueError(f"a whole number of more than {bounds.DIGITS} digits")
    return value


class Problems(list[str]):
    """Sentences on what was left out; beyond a bound they are only counted."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 0

    def append(self, text: str) -> None:
        """Add a sentence."""
        if len(self) < bounds.NUM_PROBLEMS:
            super().append(printable(text, 500))
        else:
            self.more += 1

    def told(self) -> tuple[str, ...]:
        """Return the sentences, the last of which counts those that are not among them."""
        return (*self, f"and {self.more} more problems") if self.more else tuple(self)

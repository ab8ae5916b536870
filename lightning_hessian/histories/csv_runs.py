"""The `metrics.csv` of Lightning's CSVLogger, line by line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import Problems, printable, read_bounded

_FIELD = 60
"""Characters of a field that are quoted in a sentence."""


def read_csv(file: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the rows of a `metrics.csv`, and what was left out.

    A CSV file has no checksums: a digit that turned into another digit cannot be found. Each line
    is parsed by itself, because Lightning writes no line breaks into fields: a stray quote costs
    its line, where the standard would let it swallow all that follows.

    Raises:
        UnreadableFileError: It is empty, or beyond the bounds.
        OSError: It cannot be opened.
    """
    lines = _lines(file)
    problems = Problems()
    if not lines[-1].endswith(("\n", "\r")):
        problems.append(f"line {len(lines)} is not whole (a live or interrupted run), left out")
        lines.pop()
    if not lines:
        raise UnreadableFileError(f"{file} is cut off within its first line")
    try:
        header = _fields(lines[0])
    except csv.Error as error:
        raise UnreadableFileError(f"{file} has no header of keys: {error}") from error
    rows, doubtful = _rows(lines, header, file, problems)
    numeric = {key for row in rows for key in row}
    for key, text in doubtful:
        if key in numeric:  # a column without any number is text, which is no problem
            problems.append(f"{text}, left out")
    if "step" in header:
        lost = [row for row in rows if "step" not in row]
        if lost:
            problems.append(f"{len(lost)} line(s) without a step, left out")
        rows = [row for row in rows if "step" in row]
    return rows, problems.told()


def _lines(file: Path) -> list[str]:
    text = read_bounded(file, bounds.RUN_FILE_BYTES).decode("utf-8", errors="replace")
    if not text.strip():
        raise UnreadableFileError(
            f"{file} is empty: the run wrote nothing, or the copy of it failed"
        )
    lines = text.replace("\0", "\ufffd").splitlines(keepends=True)
    if len(lines) > bounds.NUM_VALUES:
        raise UnreadableFileError(f"{file} has {len(lines)} lines, more than are read")
    return lines


def _fields(line: str) -> list[str]:
    r"""Return the fields of one line.

    Example:
        >>> _fields('1,"a ""b"", c",2\n')
        ['1', 'a "b", c', '2']
    """
    if '"' not in line:
        return line.rstrip("\r\n").split(",")
    return next(csv.reader([line.rstrip("\r\n")], strict=True))


def _rows(
    lines: list[str], header: list[str], file: Path, problems: Problems
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the rows of numbers, and doubtful fields with a sentence each."""
    doubtful: list[tuple[str, str]] = []
    doubted: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    num_values = 0
    keys = [key if len(key) <= bounds.KEY_LENGTH else None for key in header]
    if None in keys:
        problems.append(f"keys longer than {bounds.KEY_LENGTH} characters left out")
    for number, line in enumerate(lines[1:], 2):
        try:
            fields = _fields(line)
        except csv.Error as error:
            problems.append(f"line {number} left out: {error}")
            continue
        if len(fields) != len(header):
            problems.append(f"line {number} has {len(fields)} fields, not {len(header)}, left out")
            continue
        row: dict[str, Any] = {}
        for key, value in zip(keys, fields, strict=True):
            if value == "" or key is None:
                continue
            try:
                row[key] = float(value)
            except ValueError:
                doubted[key] = doubted.get(key, 0) + 1
                if doubted[key] <= bounds.NUM_PROBLEMS + 1:
                    what = printable(value, _FIELD)
                    doubtful.append((key, f"line {number}: {key} = {what!r} is no number"))
        rows.append(row)
        num_values += len(row)
        if num_values > bounds.NUM_VALUES:
            raise UnreadableFileError(f"{file} holds more than {bounds.NUM_VALUES} values")
    return rows, doubtful

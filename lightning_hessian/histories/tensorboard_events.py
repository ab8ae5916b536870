"""Read scalars back from TensorBoard event files, record by record.

A file is a row of records: length (8 bytes), its checksum (4), an `Event` in protobuf, its
checksum (4), both checksums masked CRC32C. `Event` and checksum are TensorBoard's; its loader is
not used: it gives up at the first damaged record, where here only that one is left out if its
length is whole, and it reads a record of any length that the header claims.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import Problems, open_regular, printable, reason, unreadable

_HEADER = struct.Struct("<QI")
_TEXT = "/text_summary"
_SHORT = 4096
"""Bytes of an event that is checked first, and decoded then."""


def read_events(path: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return rows ``{"step": .., tag: value}`` of all scalars, and what was left out.

    Args:
        path: An event file, ``events.out.tfevents.*``.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        UnreadableFileError: The file is beyond the bounds.
        OSError: It cannot be opened.
    """
    masked_crc32c, event_of = _tensorboard()
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

    rows: list[dict[str, Any]] = []
    problems = Problems()
    num_values = 0
    with open_regular(path, bounds.RUN_FILE_BYTES) as file, unreadable(path):
        for offset, payload, checksum in _records(file, masked_crc32c, problems):
            # Checksums in Python take 0.1 s a megabyte. Pictures are long and hold no scalars.
            matches = len(payload) > _SHORT or masked_crc32c(payload) == checksum
            try:
                event = event_of(payload) if matches else event_of(b"")
                scalars = dict(_scalars(event, offset, problems))
            except DecodeError:
                problems.append(f"the event at byte {offset} is no Event, left out")
                continue
            if scalars and len(payload) > _SHORT:
                matches = masked_crc32c(payload) == checksum
            if not matches:
                problems.append(f"the event at byte {offset} does not match its checksum, left out")
            elif scalars:
                rows.append({"step": event.step, **scalars})
            num_values += len(scalars)
            if num_values > bounds.NUM_VALUES:
                raise UnreadableFileError(f"{path} holds more than {bounds.NUM_VALUES} values")
    return rows, problems.told()


@dataclass(frozen=True)
class EventPanels:
    """What an event file holds beside scalars.

    Attributes:
        texts: By tag (without TensorBoard's ``/text_summary``), (step, text) as they were written.
        pictures: The bytes of the last picture of each tag.
    """

    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)


def read_panels(path: Path, panels: EventPanels) -> None:
    """Add the texts and the last pictures of an event file to those of the files before it.

    What `read_events` tells of damage is not told again.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
        UnreadableFileError: The file is beyond the bounds.
        OSError: It cannot be opened.
    """
    masked_crc32c, event_of = _tensorboard()
    from google.protobuf.message import DecodeError

    with open_regular(path, bounds.RUN_FILE_BYTES) as file, unreadable(path):
        for _, payload, _ in _records(file, masked_crc32c, Problems()):
            try:
                event = event_of(payload)
            except DecodeError:
                continue
            for value in event.summary.value:
                if len(value.tag) > bounds.KEY_LENGTH:
                    continue
                if value.WhichOneof("value") == "image":
                    panels.pictures[value.tag] = value.image.encoded_image_string
                elif value.tag.endswith(_TEXT) and value.tensor.string_val:
                    text = value.tensor.string_val[0].decode(errors="replace")
                    found = panels.texts.setdefault(value.tag.removesuffix(_TEXT), [])
                    found.append((event.step, text))


def _tensorboard() -> tuple[Callable[[bytes], int], Callable[[bytes], Any]]:
    """Return TensorBoard's checksum and its parser of events."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped,unused-ignore]
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import (  # type: ignore[import-untyped,unused-ignore]
            masked_crc32c,
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "event files are read with tensorboard: pip install 'lightning-hessian[tensorboard]'"
        ) from error
    return masked_crc32c, Event.FromString


def _records(
    file: BinaryIO, checksum_of: Callable[[bytes], int], problems: Problems
) -> Iterator[tuple[int, bytes, int]]:
    """Yield offset, payload and checksum of the records, one of them in memory at a time."""
    size = os.fstat(file.fileno()).st_size
    position = 0
    while position < size:
        start, body = position, position + _HEADER.size
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            problems.append(f"the file ends inside the event at byte {start} (live or cut off)")
            return
        length, checksum = _HEADER.unpack(header)
        if checksum_of(header[:8]) != checksum:
            problems.append(f"the length at byte {start} is damaged, the rest of the file left out")
            return
        position = body + length + 4
        if position > size:
            problems.append(f"the file ends inside the event at byte {start} (live or cut off)")
            return
        if length > bounds.RECORD_BYTES:
            problems.append(f"the event at byte {start} is too long, left out")
            file.seek(position)
            continue
        payload, last = file.read(length), file.read(4)
        if len(last) < 4:
            return  # the file became shorter
        yield start, payload, struct.unpack("<I", last)[0]


def _scalars(event: Any, offset: int, problems: Problems) -> Iterator[tuple[str, Any]]:
    """Yield the scalars of an event."""
    from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped,unused-ignore]

    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if not value.tag or len(value.tag) > bounds.KEY_LENGTH:
            continue
        if kind == "simple_value":
            yield value.tag, float(value.simple_value)
        elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("", "scalars"):
            # A tensor may claim any shape: one number stands for all of them in this format.
            sizes = [dim.size for dim in value.tensor.tensor_shape.dim]
            name = printable(value.tag, 200)
            if any(size != 1 for size in sizes):
                if math.prod(sizes) > bounds.RECORD_BYTES:
                    problems.append(f"{name!r} at byte {offset} claims {sizes} values, left out")
                continue
            try:
                array = make_ndarray(value.tensor)
            except (ValueError, TypeError, KeyError, NotImplementedError) as error:
                problems.append(f"{name!r} at byte {offset} left out: {reason(error)}")
                continue
            if array.size == 1 and array.dtype.kind in "fiu":
                yield value.tag, float(array.reshape(()))

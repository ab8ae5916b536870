"""Read scalars back from TensorBoard event files, record by record.

A file is a row of records: length (8 bytes), its checksum (4), an `Event` in protobuf, its
checksum (4), both checksums masked CRC32C. TensorBoard's own loader gives up at the first damaged
record; here only that one is left out where its length is whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<QI")


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum of a record.

    Source: RFC 3720 for CRC32C; the mask is that of TensorFlow's record files.

    Example:
        >>> hex(masked_crc32c(b"123456789"))
        '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns rows ``{"step": .., tag: value}`` of all scalars, and what was left out.

    Args:
        path: An event file, ``events.out.tfevents.*``.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "event files are read with tensorboard: pip install tensorboard"
        ) from error
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for offset, payload in _records(path.read_bytes(), problems):
        try:
            event = Event.FromString(payload)
        except DecodeError:
            problems.append(f"the event at byte {offset} is no Event, left out")
            continue
        scalars = dict(_scalars(event))
        if scalars:
            rows.append({"step": event.step, **scalars})
    return rows, problems


def _records(data: bytes, problems: list[str]) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        start, body = position, position + _HEADER.size
        if body > len(data):
            problems.append(f"the file ends inside the event at byte {start} (live or cut off)")
            return
        length, checksum = _HEADER.unpack_from(data, start)
        if masked_crc32c(data[start : start + 8]) != checksum:
            problems.append(f"the length at byte {start} is damaged, the rest of the file left out")
            return
        position = body + length + 4
        if position > len(data):
            problems.append(f"the file ends inside the event at byte {start} (live or cut off)")
            return
        payload = data[body : body + length]
        if masked_crc32c(payload) == struct.unpack_from("<I", data, body + length)[0]:
            yield start, payload
        else:
            problems.append(f"the event at byte {start} does not match its checksum, left out")


def _scalars(event: Any) -> Iterator[tuple[str, float]]:
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            yield value.tag, float(value.simple_value)
        elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("", "scalars"):
            from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped,unused-ignore]

            array = make_ndarray(value.tensor)
            if array.size == 1 and array.dtype.kind in "fiu":
                yield value.tag, float(array.reshape(()))

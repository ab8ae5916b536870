"""Damage to real files: bytes flipped, inserted, deleted, repeated, cut off; and raw bytes."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

from hypothesis import strategies as st

KINDS = ("flipped", "inserted", "deleted", "repeated", "cut", "raw")
"""What is done to the bytes of a file."""


_HOSTILE = [
    b"[", b"{", b'"', b"\0", b",", b"\n", b"\r", b"&a ", b"*a", b"- ", b": ", b"9" * 400,
    b"9" * 5000, b"[" * 5000, b'{"a":' * 2000, b"\xff" * 8, b"1e999", b"NaN", b"\xed\xa0\x80",
    b"\\ud800", b"PK\x05\x06", b"!!python/object/apply:os.system ['true']\n",
]  # fmt: skip


@st.composite
def damaged(draw: Callable, data: bytes, kind: str) -> bytes:
    """Bytes of a real file with one to four damages of a kind."""
    if kind == "raw":
        kept = draw(st.integers(0, min(64, len(data))))
        return data[:kept] + draw(st.binary(max_size=400) | st.sampled_from(_HOSTILE))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), begin + draw(st.sampled_from([1, 1, 2, 8, 64, 1000])))
        if kind == "flipped":
            part = draw(st.binary(min_size=end - begin, max_size=end - begin))
            data = data[:begin] + part + data[end:]
        elif kind == "inserted":
            part = draw(st.sampled_from(_HOSTILE) | st.binary(min_size=1, max_size=8))
            data = data[:begin] + part + data[begin:]
        elif kind == "deleted":
            data = data[:begin] + data[end:]
        elif kind == "repeated":
            data = data[:end] + data[begin:end] * draw(st.sampled_from([1, 3, 50])) + data[end:]
        else:
            data = data[:begin]
    return data


def rezipped(data: bytes, change: Callable[[bytes], bytes], choose: int) -> bytes:
    """A zip file in which one member is changed, with the checksum that it has now."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = old.namelist()[choose % len(old.namelist())]
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == chosen else content)
    return out.getvalue()


def events(payloads: list[bytes], checksum: Callable[[bytes], int]) -> bytes:
    """An event file of these records."""
    out = b""
    for payload in payloads:
        length = struct.pack("<Q", len(payload))
        out += length + struct.pack("<I", checksum(length))
        out += payload + struct.pack("<I", checksum(payload))
    return out

"""The records of a `.wandb` file: a LevelDB log with a checksum of W&B's own.

After a file header of 7 bytes, blocks of 32 KiB hold chunks, one or several to a record
(https://github.com/google/leveldb/blob/main/doc/log_format.md). W&B differs in the checksum of a
chunk: it is the plain CRC32 of zlib over kind and payload, not LevelDB's masked CRC32C (checked on
files of wandb 0.31).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import Problems

_IDENT, _MAGIC, _VERSION = b":W&B", 0xBEE1, 0
_FILE_HEADER = struct.Struct("<4sHB")
_BLOCK = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length of the payload, kind
_KIND = 6  # offset of the kind, where the bytes under the checksum begin
_DAMAGED, _FULL, _FIRST, _MIDDLE, _LAST = range(5)  # a chunk of kind 0 is never written


class EmptyRunError(UnreadableFileError):
    """There is nothing in the file of a run yet."""


def check_file_header(file: BinaryIO, path: Path) -> None:
    """Read past the header of the file, or say why it cannot be a W&B run."""
    header = file.read(_FILE_HEADER.size)
    if not header:
        raise EmptyRunError(f"{path} is empty: the run wrote nothing, or the copy of it failed")
    expected = _FILE_HEADER.pack(_IDENT, _MAGIC, _VERSION)
    if header != expected:
        raise UnreadableFileError(
            f"{path} is not a W&B run: it begins with {header!r}, not {expected!r}; "
            "pass the .wandb file of a run folder"
        )


class TransactionLog:
    """The records in an open `.wandb` file, one block in memory at a time.

    Iterating yields ``(offset, payload)`` of every whole record. Afterwards ``problems`` names what
    was left out, and ``complete`` says whether the file ended where a record ends.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._cut_at: int | None = None
        self.problems = Problems()
        self._searched = 0
        self.complete = True

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        begin: int | None = None
        parts: list[bytes] = []
        size = 0
        damaged = False  # since the last whole record: stray ends of records are explained then
        for offset, kind, payload in self._chunks():
            if begin is not None and kind not in (_MIDDLE, _LAST):
                self.problems.append(f"the record at byte {begin} is not whole, left out")
                begin = None
            if kind == _DAMAGED:
                damaged = True
                continue
            if kind in (_FULL, _FIRST):
                begin, parts, size = offset, [], 0
            elif begin is None:
                if not damaged:
                    self.problems.append(f"no record begins before the part at byte {offset}")
                continue
            size += len(payload)
            if size > bounds.RECORD_BYTES:
                self.problems.append(f"the record at byte {begin} is too long, left out")
                begin, damaged = None, True
                continue
            parts.append(payload)
            if kind in (_FULL, _LAST):
                yield begin, b"".join(parts)
                begin, damaged = None, False
        begin = self._cut_at if begin is None else begin
        if begin is not None:
            self.complete = False
            self.problems.append(
                f"the file ends inside the record at byte {begin} (a live or interrupted run)"
            )

    def _chunks(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, kind and payload of the chunks; kind 0 where damage was stepped over."""
        start, position = 0, _FILE_HEADER.size
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            # Fewer bytes than a header at the end of a block are padding.
            while position < len(block) and position + _CHUNK_HEADER.size <= _BLOCK:
                offset, end = start + position, _chunk_end(block, position)
                if end is not None:
                    yield offset, block[position + _KIND], block[position + _KIND + 1 : end]
                    position = end
                    continue
                end = self._next_chunk(block, position)
                if end == len(block) < _BLOCK:  # nothing whole follows: damaged, or just cut short?
                    claimed = _claimed_end(block, position)
                    if len(block) < claimed <= _BLOCK:
                        self._cut_at = offset
                        return
                    self.complete = claimed == len(block)
                self.problems.append(
                    f"bytes {offset} to {start + end} do not match their checksum, left out"
                )
                yield offset, _DAMAGED, b""
                position = end
            if len(block) < _BLOCK:  # more may have been written since, but not into this block
                return
            start, position = start + _BLOCK, 0

    def _next_chunk(self, block: bytes, position: int) -> int:
        """Return where the next whole chunk after a damaged one begins, or where the block ends.

        The damaged length cannot be trusted, so every offset is tried; a checksum of 32 bits that
        fits by chance is rarer than a damaged file. Bytes that look like headers everywhere would
        cost minutes, so that the search is given up after a bound, and the block with it.
        """
        for at in range(position + 1, len(block) - _CHUNK_HEADER.size + 1):
            if not _FULL <= block[at + _KIND] <= _LAST:
                continue
            self._searched += min(_claimed_end(block, at), len(block)) - at
            if self._searched > bounds.SEARCH_BYTES:
                return len(block)
            if _chunk_end(block, at) is not None:
                return at
        return len(block)


def _claimed_end(block: bytes, position: int) -> int:
    """Where the chunk at ``position`` says that it ends; past ``block`` if its header is cut."""
    if position + _CHUNK_HEADER.size > len(block):
        return position + _CHUNK_HEADER.size
    _, length, _ = _CHUNK_HEADER.unpack_from(block, position)
    found: int = position + _CHUNK_HEADER.size + length
    return found


def _chunk_end(block: bytes, position: int) -> int | None:
    """Where the chunk at ``position`` ends; ``None`` if it is cut or fails its checksum."""
    end = _claimed_end(block, position)
    if end > len(block):
        return None
    checksum, _, kind = _CHUNK_HEADER.unpack_from(block, position)
    if not _FULL <= kind <= _LAST:
        return None
    return end if zlib.crc32(block[position + _KIND : end]) == checksum else None

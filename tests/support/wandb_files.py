"""Run files of W&B, written and taken apart byte by byte."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import HistoryItem, Record

from lightning_hessian.histories.offline_run import OfflineRun, read_offline_run

BLOCK = 32 * 1024
FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)


def read_bytes(data: bytes, folder: Path) -> OfflineRun:
    file = folder / "run-copy.wandb"
    file.write_bytes(data)
    return read_offline_run(file)


def chunk_spans(data: bytes) -> list[tuple[int, int, int]]:
    """Begin, end and kind of every chunk of an undamaged file."""
    spans, position = [], len(FILE_HEADER)
    while position < len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        spans.append((position, position + 7 + length, kind))
        position += 7 + length
    return spans


def framed(records: Iterable[Record | bytes]) -> bytes:
    """A W&B file of these records, written here and not by wandb."""
    out = bytearray(FILE_HEADER)
    for record in records:
        rest = record if isinstance(record, bytes) else record.SerializeToString()
        first = True
        while first or rest:
            if (room := BLOCK - len(out) % BLOCK) < 7:
                out += bytes(room)
                room = BLOCK
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            body = bytes([kind]) + piece
            out += struct.pack("<IH", zlib.crc32(body), len(piece)) + body
            first = False
    return bytes(out)


def history_record(step: int, *items: HistoryItem, **values: Any) -> Record:
    record = Record()
    record.history.step.num = step
    record.history.item.extend(items)
    for key, value in values.items():
        record.history.item.add(nested_key=[key], value_json=json.dumps(value))
    return record


def padded_record(step: int, size: int) -> Record:
    """A history record whose single chunk takes ``size`` bytes, of at least 20 KiB."""
    pad = size - 400
    short = size - 7 - history_record(step, pad="z" * pad).ByteSize()
    record = history_record(step, pad="z" * (pad + short))
    assert record.ByteSize() + 7 == size
    return record


def inspected(file: Path, *options: str) -> str:
    """What wandb's own reader prints about a file."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect"]
    if subprocess.run([*command, "--help"], capture_output=True).returncode:
        pytest.skip("this wandb has no `leet inspect`")
    done = subprocess.run(
        [*command, *options, "--json", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_printed(value: Any) -> Any:
    """A value with NaN and infinity spelled out, as the inspector prints them."""
    if isinstance(value, dict):
        return {key: as_printed(child) for key, child in value.items()}
    if isinstance(value, list):
        return [as_printed(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return value


def inspected_rows(file: Path) -> list[dict[str, Any]]:
    records = map(json.loads, inspected(file).splitlines())
    return [r["history"]["item"] for r in records if r.get("type") == "history"]

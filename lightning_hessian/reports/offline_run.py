"""Read an offline W&B run back from the `.wandb` file that it left on the disk.

The file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md): after a
file header of 7 bytes, blocks of 32 KiB hold chunks, one or several to a record, and each record is
a `wandb_internal.Record` in protobuf. W&B differs in the checksum of a chunk: it is the plain CRC32
of zlib over kind and payload, not LevelDB's masked CRC32C (checked on files of wandb 0.31).
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from lightning_hessian.results import arguments

_IDENT, _MAGIC, _VERSION = b":W&B", 0xBEE1, 0
_FILE_HEADER = struct.Struct("<4sHB")
_BLOCK = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length of the payload, kind
_KIND = 6  # offset of the kind, where the bytes under the checksum begin
_DAMAGED, _FULL, _FIRST, _MIDDLE, _LAST = range(5)  # a chunk of kind 0 is never written

_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

# A run folder, the `wandb` folder around it, and the `save_dir` of a logger around that.
_PLACES = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")


class EmptyRunError(ValueError):
    """There is nothing in the file of a run yet."""


@dataclass(frozen=True, eq=False)
class OfflineRun:
    """One run as its `.wandb` file tells it.

    Attributes:
        run_id: Id of the run, as in the name of its folder.
        project: Project, empty where the run named none.
        name: Display name, empty where W&B would choose one when the run is synced.
        config: The configuration, nested as it was given.
        rows: One dict for one history record, in the order of the file, with `_step`, `_runtime`
            and `_timestamp`. A dict that was logged as a value is flattened, its keys joined by
            dots as in W&B's own columns; other keys, slashes and all, stay as they were logged.
            The order of the keys is wandb's and means nothing.
        summary: The last values (or what `define_metric` made of them), nested.
        complete: False where the file ends inside a record, or where damage hides whether it does:
            the run is live, was killed, or the file was not copied to its end. A live run that is
            read between two writes is complete so far; ``exit_code`` tells it from an ended one.
        problems: What was left out, and why; empty for a run that finished undisturbed.
        exit_code: What the run ended with, ``None`` for one that has not ended.
    """

    run_id: str
    project: str
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    complete: bool
    problems: tuple[str, ...] = ()
    exit_code: int | None = None

    def history(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows that hold a value for every one of ``keys``, all rows without ``keys``.

        That is the choice of rows that `wandb.apis.public.Run.scan_history` makes; the rows come
        whole, though, with the keys that were not asked for. Steps that repeat are all kept.

        Args:
            keys: Names of metrics, as logged.

        Raises:
            TypeError: ``keys`` is one string.

        Example:
            >>> rows = [{"_step": 0, "loss": 2.0}, {"_step": 1, "loss": 1.0, "hessian/d_ks": 0.1}]
            >>> run = OfflineRun("id", "project", "name", {}, rows, {}, complete=True)
            >>> [row["_step"] for row in run.history(keys=["loss", "hessian/d_ks"])]
            [1]
        """
        if isinstance(keys, str):
            raise TypeError(f"keys must be a list of metric names; write keys=[{keys!r}]")
        wanted = keys or ()
        return [row for row in self.rows if all(row.get(key) is not None for key in wanted)]


@arguments.checked({"path": arguments.path_name, "summary": arguments.flag})
def read_offline_run(path: str | PathLike[str], *, summary: bool = True) -> OfflineRun:
    """The offline run at ``path``, as far as its file is whole.

    A run that is still writing can be read; wandb writes to the file when 32 KiB have come
    together, every 15 seconds (0.31), and at the end. Runs of other modes leave the same file.

    Args:
        path: The run folder (`wandb/offline-run-<time>-<id>`), the `.wandb` file in it, or a folder
            with one run below it (`wandb`, or the `save_dir` of a logger).
        summary: Whether the summary is wanted, which takes a fifth of the time.

    Raises:
        FileNotFoundError: There is no such path, or no `.wandb` file there.
        ValueError: There are several runs, or the file is empty or not one of W&B's.
    """
    file_path = _find_file(Path(path))
    run_id, project, name = file_path.stem.removeprefix("run-"), "", ""
    rows: list[dict[str, Any]] = []
    config, last_values = _Updates(), _Updates()
    exit_code = None
    with file_path.open("rb") as file:
        _check_file_header(file, file_path)
        log = _TransactionLog(file)
        for offset, record in _decoded(log):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append(_row(record.history, offset, log.problems))
            elif kind == "summary":
                if summary:
                    last_values.apply(record.summary)
            elif kind == "config":
                config.apply(record.config)
            elif kind == "run":
                run_id = record.run.run_id or run_id
                project = record.run.project or project
                name = record.run.display_name or name
                config.apply(record.run.config)
                last_values.apply(record.run.summary)
            elif kind == "exit":
                exit_code = record.exit.exit_code
    return OfflineRun(
        run_id=run_id,
        project=project,
        name=name,
        config=config.nested("config", log.problems),
        rows=rows,
        summary=last_values.nested("summary", log.problems),
        complete=log.complete,
        problems=tuple(log.problems),
        exit_code=exit_code,
    )


def _find_file(path: Path) -> Path:
    """The one `.wandb` file that ``path`` means."""
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the folder of an offline W&B run")
    for place in _PLACES:
        found = sorted(path.glob(place))
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(str(file.relative_to(path)) for file in found)
            raise ValueError(f"{path} holds {len(found)} W&B runs, pass one of them: {listed}")
    raise FileNotFoundError(
        f"no .wandb file in {path}; pass a run folder, wandb/offline-run-<time>-<id>"
    )


def _check_file_header(file: BinaryIO, path: Path) -> None:
    """Read past the header of the file, or say why it cannot be a W&B run."""
    header = file.read(_FILE_HEADER.size)
    if not header:
        raise EmptyRunError(f"{path} is empty: the run wrote nothing, or the copy of it failed")
    expected = _FILE_HEADER.pack(_IDENT, _MAGIC, _VERSION)
    if header != expected:
        raise ValueError(
            f"{path} is not a W&B run: it begins with {header!r}, not {expected!r}; "
            "pass the .wandb file of a run folder"
        )


class _TransactionLog:
    """The records in an open `.wandb` file, one block in memory at a time.

    Iterating yields ``(offset, payload)`` of every whole record. Afterwards ``problems`` names what
    was left out, and ``complete`` says whether the file ended where a record ends.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._cut_at: int | None = None
        self.problems: list[str] = []
        self.complete = True

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        begin: int | None = None
        parts: list[bytes] = []
        damaged = False  # since the last whole record: stray ends of records are explained then
        for offset, kind, payload in self._chunks():
            if begin is not None and kind not in (_MIDDLE, _LAST):
                self.problems.append(f"the record at byte {begin} is not whole, left out")
                begin = None
            if kind == _DAMAGED:
                damaged = True
                continue
            if kind in (_FULL, _FIRST):
                begin, parts = offset, []
            elif begin is None:
                if not damaged:
                    self.problems.append(f"no record begins before the part at byte {offset}")
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
                end = _next_chunk(block, position)
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


def _claimed_end(block: bytes, position: int) -> int:
    """Where the chunk at ``position`` says that it ends; past ``block`` if its header is cut."""
    if position + _CHUNK_HEADER.size > len(block):
        return position + _CHUNK_HEADER.size
    _, length, _ = _CHUNK_HEADER.unpack_from(block, position)
    return position + _CHUNK_HEADER.size + length


def _chunk_end(block: bytes, position: int) -> int | None:
    """Where the chunk at ``position`` ends; ``None`` if it is cut or fails its checksum."""
    end = _claimed_end(block, position)
    if end > len(block):
        return None
    checksum, _, kind = _CHUNK_HEADER.unpack_from(block, position)
    if not _FULL <= kind <= _LAST:
        return None
    return end if zlib.crc32(block[position + _KIND : end]) == checksum else None


def _next_chunk(block: bytes, position: int) -> int:
    """Where the next whole chunk after a damaged one begins, or where the block ends.

    The damaged length cannot be trusted, so every offset is tried; a checksum of 32 bits that fits
    by chance is rarer than a damaged file.
    """
    candidates = range(position + 1, len(block) - _CHUNK_HEADER.size + 1)
    return next((at for at in candidates if _chunk_end(block, at) is not None), len(block))


def _decoded(log: _TransactionLog) -> Iterator[tuple[int, Any]]:
    """Offset and protobuf message of the records in ``log``."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
    from wandb.proto.wandb_internal_pb2 import Record

    for offset, payload in log:
        try:
            yield offset, Record.FromString(payload)
        except DecodeError:
            log.problems.append(
                f"the record at byte {offset} is not one that this wandb knows, left out"
            )


class _Updates:
    """Config or summary while the records come in: the last text for each path.

    Only what remains at the end is decoded; most of a file is summaries that were overwritten.
    """

    def __init__(self) -> None:
        self._texts: dict[tuple[str, ...], str | None] = {}

    def apply(self, record: Any) -> None:
        """Take in a `ConfigRecord` or a `SummaryRecord`."""
        changes = [(item, item.value_json) for item in record.update]
        for item, text in [*changes, *((item, None) for item in record.remove)]:
            path = tuple(item.nested_key) or (item.key,)
            self._texts.pop(path, None)  # the order of the dict is that of the last changes
            self._texts[path] = text

    def nested(self, what: str, problems: list[str]) -> dict[str, Any]:
        """The values as a nested dict, without the entry that W&B keeps for itself."""
        root: dict[str, Any] = {}
        for (*parents, leaf), text in self._texts.items():
            node = root
            for key in parents:
                if not isinstance(node.get(key), dict):
                    node[key] = {}
                node = node[key]
            if text is None:
                node.pop(leaf, None)
                continue
            try:
                node[leaf] = finite_or_float(json.loads(text))
            except ValueError:
                name = ".".join([*parents, leaf])
                problems.append(f"{what} {name!r} is not JSON, left out")
        root.pop("_wandb", None)
        return root


def _row(history: Any, offset: int, problems: list[str]) -> dict[str, Any]:
    """The row that one `HistoryRecord` holds."""
    row: dict[str, Any] = {}
    values = _parsed_together(history.item)
    for place, item in enumerate(history.item):
        key = ".".join(item.nested_key) or item.key
        try:
            value = _item_value(item) if values is None else values[place]
        except ValueError as error:
            problems.append(f"{key!r} in the record at byte {offset} left out: {error}")
            continue
        if isinstance(value, dict):
            row.update(_leaves(key, value))
        else:
            row[sys.intern(key)] = finite_or_float(value)
    if history.HasField("step"):
        row.setdefault("_step", history.step.num)
    return row


def _parsed_together(items: Any) -> list[Any] | None:
    """The values of all items by one call of the parser, the usual case; None where it is not."""
    texts = [item.value_json for item in items]
    if not all(texts):
        return None
    try:
        values = json.loads(f"[{','.join(texts)}]")
    except ValueError:
        return None
    return values if len(values) == len(texts) else None


def _item_value(item: Any) -> Any:
    """The value of a `HistoryItem`, from its JSON or, where that is not set, its typed form.

    The typed form (wandb 0.31, `x_history_value_encoding`) is read by the names of its fields, so
    that an older wandb, which lacks them, still reads the JSON.
    """
    if item.value_json:
        return json.loads(item.value_json)
    for field, value in item.ListFields():
        if field.name == "none":
            return None
        if field.name == "json":
            return json.loads(value)
        if field.name not in ("key", "nested_key"):
            return value
    raise ValueError("it has no value that the installed wandb knows; a newer one may")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Key and value, or, of a dict, its leaves under their keys joined by dots."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(f"{key}.{name}", child)
    else:
        yield sys.intern(key), finite_or_float(value)


def finite_or_float(value: Any) -> Any:
    """``value``, or the float that it spells where JSON has no number for it ("NaN", "Infinity").

    wandb 0.31 writes these bare, which `json` understands; W&B's server hands them on in quotes.
    """
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value

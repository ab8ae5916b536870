"""Read an offline W&B run back from the `.wandb` file that it left on the disk.

Each record of its log (see `transaction_log`) is a `wandb_internal.Record` in protobuf.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from lightning_hessian.histories.transaction_log import TransactionLog, check_file_header
from lightning_hessian.results import UnreadableFileError, arguments, bounds
from lightning_hessian.results.outside import (
    check_integer,
    encodable,
    inside,
    open_regular,
    parse_json,
    printable,
    unreadable,
)
from lightning_hessian.results.path_arguments import path_name

_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

# A run folder, the `wandb` folder around it, and the `save_dir` of a logger around that.
_PLACES = ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb")


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
        group: The group of runs that it belongs to, empty where it belongs to none.
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
    group: str = ""


@arguments.checked({"path": path_name, "summary": arguments.flag})
def read_offline_run(path: str | PathLike[str], *, summary: bool = True) -> OfflineRun:
    """Return the offline run at ``path``, as far as its file is whole.

    A run that is still writing can be read; wandb writes to the file when 32 KiB have come
    together, every 15 seconds (0.31), and at the end. Runs of other modes leave the same file.

    Args:
        path: The run folder (`wandb/offline-run-<time>-<id>`), the `.wandb` file in it, or a folder
            with one run below it (`wandb`, or the `save_dir` of a logger).
        summary: Whether the summary is wanted, which takes a fifth of the time.

    Raises:
        FileNotFoundError: There is no such path, or no `.wandb` file there.
        UnreadableFileError: The file is empty, not one of W&B's, or beyond the bounds of
            `lightning_hessian.results.bounds`; a ValueError.
        ValueError: There are several runs.
    """
    file_path = find_run_file(Path(path))
    with open_regular(file_path, bounds.RUN_FILE_BYTES) as file, unreadable(file_path):
        return _read(file, file_path, summary)


def _read(file: BinaryIO, file_path: Path, summary: bool) -> OfflineRun:
    run_id, project, name, group = file_path.stem.removeprefix("run-"), "", "", ""
    rows: list[dict[str, Any]] = []
    config, last_values = _Updates(), _Updates()
    exit_code, num_values = None, 0
    check_file_header(file, file_path)
    log = TransactionLog(file)
    for offset, record in _decoded(log):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row, count = _row(record.history, offset, log.problems)
            rows.append(row)
            num_values += count
            if num_values > bounds.NUM_VALUES:
                raise UnreadableFileError(
                    f"{file_path} holds more than {bounds.NUM_VALUES} values, which are not read."
                )
        elif kind == "summary":
            if summary:
                last_values.apply(record.summary)
        elif kind == "config":
            config.apply(record.config)
        elif kind == "run":
            run_id = record.run.run_id or run_id
            project = record.run.project or project
            name = record.run.display_name or name
            group = record.run.run_group or group
            config.apply(record.run.config)
            last_values.apply(record.run.summary)
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return OfflineRun(
        run_id=printable(run_id, bounds.NAME_LENGTH),
        project=printable(project, bounds.NAME_LENGTH),
        name=printable(name, bounds.NAME_LENGTH),
        config=config.nested("config", log.problems),
        rows=rows,
        summary=last_values.nested("summary", log.problems),
        complete=log.complete,
        problems=log.problems.told(),
        exit_code=exit_code,
        group=printable(group, bounds.NAME_LENGTH),
    )


def find_run_file(path: Path) -> Path:
    """Return the one `.wandb` file that ``path`` means."""
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the folder of an offline W&B run")
    if not path.is_dir():
        return path  # a pipe or device, which is refused where it would be opened
    for place in _PLACES:
        found = sorted(path.glob(place))
        if len(found) == 1:
            inside(found[0], path)
            return found[0]
        if found:
            listed = ", ".join(str(file.relative_to(path)) for file in found)
            raise ValueError(f"{path} holds {len(found)} W&B runs, pass one of them: {listed}")
    raise FileNotFoundError(
        f"no .wandb file in {path}; pass a run folder, wandb/offline-run-<time>-<id>"
    )


def _decoded(log: TransactionLog) -> Iterator[tuple[int, Any]]:
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
        changes += [(item, None) for item in record.remove]
        for item, text in changes:
            path = tuple(item.nested_key) or (item.key,)
            self._texts.pop(path, None)  # the order of the dict is that of the last changes
            self._texts[path] = text

    def nested(self, what: str, problems: list[str]) -> dict[str, Any]:
        """Return the values as a nested dict, without the entry that W&B keeps for itself."""
        root: dict[str, Any] = {}
        for path, text in self._texts.items():
            try:
                _check_path(path)
                value = None if text is None else finite_or_float(parse_json(text))
            except ValueError as error:
                name = printable(".".join(path), 200)
                problems.append(f"{what} {name!r} is not JSON within the bounds, left out: {error}")
                continue
            *parents, leaf = path
            node = root
            for key in parents:
                if not isinstance(node.get(key), dict):
                    node[key] = {}
                node = node[key]
            if text is None:
                node.pop(leaf, None)
            else:
                node[leaf] = value
        root.pop("_wandb", None)
        return root


def _check_path(path: Sequence[str]) -> None:
    """Raise ValueError where a path of keys is deeper or longer than the bounds."""
    if len(path) > bounds.DEPTH:
        raise ValueError(f"its key is nested deeper than {bounds.DEPTH}")
    if sum(map(len, path)) > bounds.KEY_LENGTH:
        raise ValueError(f"its key is longer than {bounds.KEY_LENGTH} characters")


def _row(history: Any, offset: int, problems: list[str]) -> tuple[dict[str, Any], int]:
    """Return the row of one `HistoryRecord`, and the number of its values, those of lists too."""
    row: dict[str, Any] = {}
    values, count = _parsed_together(history.item)
    most, intern = bounds.DEPTH, sys.intern  # so few characters are no deep path either
    for place, item in enumerate(history.item):
        key = ".".join(item.nested_key) or item.key
        try:
            if len(key) > most:
                _check_path(tuple(item.nested_key) or (key,))
            value = _item_value(item) if values is None else values[place]
            if type(value) is float:
                row[intern(key)] = value
            elif isinstance(value, dict):
                row.update(_leaves(key, value))
            else:
                row[intern(key)] = finite_or_float(value)
        except ValueError as error:
            name = printable(key, 200)
            problems.append(f"{name!r} in the record at byte {offset} left out: {error}")
    if history.HasField("step"):
        row.setdefault("_step", history.step.num)
    return row, count


def _parsed_together(items: Any) -> tuple[list[Any] | None, int]:
    """Return the values of all items by one call of the parser; None where that cannot be.

    Also how many values there are at most; a comma stands between any two.
    """
    texts = [item.value_json for item in items]
    together = f"[{','.join(texts)}]"
    count = together.count(",") + 1
    if not all(texts):
        return None, count
    try:
        values = parse_json(together)
    except ValueError:
        return None, count
    return (values if len(values) == len(texts) else None), count


def _item_value(item: Any) -> Any:
    """Return the value of a `HistoryItem`, from its JSON or, where that is not set, its typed form.

    The typed form (wandb 0.31, `x_history_value_encoding`) is read by the names of its fields, so
    that an older wandb, which lacks them, still reads the JSON.
    """
    if item.value_json:
        return parse_json(item.value_json)
    for field, value in item.ListFields():
        if field.name == "none":
            return None
        if field.name == "json":
            return parse_json(value)
        if field.name not in ("key", "nested_key"):
            return value
    raise ValueError("it has no value that the installed wandb knows; a newer one may")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Key and value, or, of a dict, its leaves under their keys joined by dots."""
    if len(key) > bounds.KEY_LENGTH:
        raise ValueError(f"its key is longer than {bounds.KEY_LENGTH} characters")
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(encodable(f"{key}.{name}"), child)
    else:
        yield sys.intern(key), finite_or_float(value)


def finite_or_float(value: Any) -> Any:
    """``value``, or the float that it spells where JSON has no number for it ("NaN", "Infinity").

    wandb 0.31 writes these bare, which `json` understands; W&B's server hands them on in quotes.

    Raises:
        ValueError: It is a whole number of more digits than float64 can hold.
    """
    if type(value) is int:
        return check_integer(value)
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value

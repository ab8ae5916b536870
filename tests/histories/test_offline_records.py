"""Records that a run file may hold, written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.wandb_files import (
    BLOCK,
    FILE_HEADER,
    framed,
    history_record,
    inspected_rows,
    padded_record,
    read_bytes,
)
from wandb.proto.wandb_internal_pb2 import HistoryItem, Record


def test_records_that_end_at_every_distance_from_the_block(tmp_path: Path) -> None:
    """0 to 6 bytes left are padding, 7 hold a first chunk of no payload, more hold some."""
    records: list[Record] = []
    for step, left in enumerate(range(20)):
        room = BLOCK - len(framed(records)) % BLOCK
        records += [padded_record(step, room - left), history_record(1000 + step, loss=step / 4)]
    data = framed(records)
    run = read_bytes(data, tmp_path)
    assert (run.complete, run.problems) == (True, ())
    assert [row["loss"] for row in run.rows if "loss" in row] == [n / 4 for n in range(20)]
    assert [row["_step"] for row in run.rows] == [s for n in range(20) for s in (n, 1000 + n)]
    theirs = inspected_rows(tmp_path / "run-copy.wandb")
    assert [row.get("loss") for row in run.rows] == [row.get("loss") for row in theirs]


def test_values_without_json(tmp_path: Path) -> None:
    """The typed form alone, which wandb 0.31 can read but does not yet write."""
    if "value" not in HistoryItem.DESCRIPTOR.oneofs_by_name:
        pytest.skip("this wandb has no typed history values")
    record = history_record(
        4,
        HistoryItem(nested_key=["zero"], number=0.0),
        HistoryItem(nested_key=["nan"], number=math.nan),
        HistoryItem(nested_key=["count"], integer=2**60 + 1),
        HistoryItem(nested_key=["no"], boolean=False),
        HistoryItem(nested_key=["none"], none=0),
        HistoryItem(nested_key=["text"], text=""),
        HistoryItem(nested_key=["block", "0"], json='{"d_ks": [Infinity, 2]}'),
        HistoryItem(key="plain", value_json='{"a": {"b": "NaN"}}'),
    )
    (row,) = read_bytes(framed([record]), tmp_path).rows
    assert math.isnan(row.pop("nan"))
    assert math.isnan(row.pop("plain.a.b"))
    assert row == {
        "zero": 0.0,
        "count": 2**60 + 1,
        "no": False,
        "none": None,
        "text": "",
        "block.0.d_ks": [math.inf, 2],
        "_step": 4,
    }


def test_what_cannot_be_read_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    broken_value = HistoryItem(nested_key=["half"], value_json="[1,")
    no_value = HistoryItem(nested_key=["void"])
    records = [
        history_record(0, loss=2.0),
        b"\xff\xff\xff no protobuf",
        history_record(1, broken_value, no_value, loss=1.0),
    ]
    run = read_bytes(framed(records), tmp_path)
    assert [(row["_step"], row["loss"]) for row in run.rows] == [(0, 2.0), (1, 1.0)]
    assert [set(row) for row in run.rows] == [{"_step", "loss"}] * 2
    assert run.complete
    assert (run.run_id, run.config, run.summary, run.exit_code) == ("copy", {}, {}, None)
    unknown, half, void = run.problems
    assert "is not one that this wandb knows" in unknown
    assert "'half'" in half
    assert "'void'" in void


def test_parts_of_records_that_belong_to_nothing(tmp_path: Path) -> None:
    """Two files that were mixed at the boundary of their first blocks, every checksum right."""
    long = framed([history_record(0, pad="p" * 3 * BLOCK), history_record(1)])
    short = framed([padded_record(2, BLOCK - len(FILE_HEADER)), history_record(3)])
    run = read_bytes(short[:BLOCK] + long[BLOCK:], tmp_path)
    assert [row["_step"] for row in run.rows] == [2, 1]
    assert run.problems[0] == f"no record begins before the part at byte {BLOCK}"
    run = read_bytes(long[:BLOCK] + short[BLOCK:], tmp_path)
    assert [row["_step"] for row in run.rows] == [3]
    assert run.problems == (f"the record at byte {len(FILE_HEADER)} is not whole, left out",)


def test_later_updates_and_removals_win(tmp_path: Path) -> None:
    def summary(remove: list[list[str]], **updates: Any) -> Record:
        record = Record()
        for key, value in updates.items():
            record.summary.update.add(nested_key=key.split("__"), value_json=json.dumps(value))
        for path in remove:
            record.summary.remove.add(nested_key=path)
        return record

    records = [
        summary([], a__b=1, a__c=2, d=3, e={"f": 4, "g": 5}),
        summary([["a", "b"], ["d"], ["e", "f"]], h=6),
        summary([], h__min=7, a__i=math.nan),
    ]
    run = read_bytes(framed(records), tmp_path)
    assert math.isnan(run.summary["a"].pop("i"))
    assert run.summary == {"a": {"c": 2}, "e": {"g": 5}, "h": {"min": 7}}


def test_a_run_that_only_began(tmp_path: Path) -> None:
    run = read_bytes(FILE_HEADER, tmp_path)
    assert (run.rows, run.summary, run.complete, run.problems) == ([], {}, True, ())

"""Offline runs that wandb itself wrote, read back; wandb's own inspector is the second reader."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path

import pytest
from support.report_runs import recording
from support.wandb_files import (
    BLOCK,
    FILE_HEADER,
    as_printed,
    chunk_spans,
    inspected,
    inspected_rows,
    read_bytes,
)

from lightning_hessian.histories.offline_run import read_offline_run

wandb = pytest.importorskip("wandb")


STEPS = 50


pytestmark = pytest.mark.usefixtures("own_wandb")


def scalars(step: int) -> dict[str, float]:
    return {
        "hessian/d_ks": math.sin(step) / 3,
        "val/loss": 10.0 ** (step - 25),
        "trainer/global_step": 7 * step,
    }


@pytest.fixture(scope="module")
def fifty_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fifty")
    config = {"lr": 0.1, "model": {"width": 64, "act": "gelu"}, "data/name": "mnist", "tags": [1]}
    with recording(folder, project="reports", name="fifty steps", config=config) as run:
        run.define_metric("val/loss", summary="min,last")
        for step in range(STEPS):
            run.log(scalars(step))
        run.config.update({"late": True, "limit": math.inf})
        run.summary["verdict"] = "flat"
    return only_file(folder)


@pytest.fixture(scope="module")
def odd_values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    with recording(folder, project="reports") as run:
        run.log({"x": math.nan, "hessian/beta": math.inf, "s": -math.inf, "list": [1, math.nan]})
        run.log({"x": 1.5, "text": "two words", "none": None, "yes": True, "big": 2**62})
        run.log({"block": {"0": {"d_ks": 0.25}, "1/mlp": 4}, "dotted.key": 5, "ünï/κey": 6})
        run.log({"spectrum": wandb.Histogram([1.0, 2.0, 3.0], num_bins=2)})
        run.log({"x": 8}, step=20)
        run.log({"y": 9}, step=20)
        run.log({"x": -1}, step=3)
    return only_file(folder)


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of all sizes, among them three that are longer than a block."""
    folder = tmp_path_factory.mktemp("sizes")
    with recording(folder) as run:
        for step in range(250):
            run.log({"pad": "x" * (step * 13 % 1009), "loss": step / 8})
        run.log({"pad": "y" * 100_000, "loss": -1.0})
        run.log({f"hessian/eigenvalue_{index:04}": index / 7 for index in range(2000)})
        run.log({"loss": -2.0})
    return only_file(folder)


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return file


def test_every_value_of_fifty_steps(fifty_steps: Path) -> None:
    run = read_offline_run(fifty_steps)
    assert (run.complete, run.problems, run.exit_code) == (True, (), 0)
    assert len(run.rows) == STEPS
    for step, row in enumerate(run.rows):
        assert row["_step"] == step
        assert {key: row[key] for key in scalars(step)} == scalars(step)
        assert set(row) == {*scalars(step), "_step", "_runtime", "_timestamp"}
    assert [row["_timestamp"] for row in run.rows] == sorted(r["_timestamp"] for r in run.rows)
    assert all(row["_runtime"] >= 0 for row in run.rows)


def test_identity_config_and_summary(fifty_steps: Path) -> None:
    run = read_offline_run(fifty_steps)
    assert fifty_steps.name == f"run-{run.run_id}.wandb"
    assert (run.project, run.name) == ("reports", "fifty steps")
    assert run.config == {
        "lr": 0.1,
        "model": {"width": 64, "act": "gelu"},
        "data/name": "mnist",
        "tags": [1],
        "late": True,
        "limit": math.inf,
    }
    last = scalars(STEPS - 1)
    assert run.summary["verdict"] == "flat"
    assert run.summary["hessian/d_ks"] == last["hessian/d_ks"]
    assert run.summary["val/loss"] == {"min": scalars(0)["val/loss"], "last": last["val/loss"]}


def test_values_that_json_lacks_and_nested_keys(odd_values: Path) -> None:
    first, second, nested, histogram, late = read_offline_run(odd_values).rows
    assert math.isnan(first["x"])
    assert (first["hessian/beta"], first["s"]) == (math.inf, -math.inf)
    assert first["list"][0] == 1
    assert math.isnan(first["list"][1])
    expected = {"x": 1.5, "text": "two words", "none": None, "yes": True, "big": 2**62}
    assert {key: second[key] for key in expected} == expected
    expected = {"block.0.d_ks": 0.25, "block.1/mlp": 4, "dotted.key": 5, "ünï/κey": 6}
    assert {key: nested[key] for key in expected} == expected
    assert histogram["spectrum._type"] == "histogram"
    assert sum(histogram["spectrum.values"]) == 3
    # Logs to one step share a row; a step that goes back never reaches the file.
    assert (late["_step"], late["x"], late["y"]) == (20, 8, 9)


def test_records_of_all_sizes(many_sizes: Path) -> None:
    run = read_offline_run(many_sizes)
    assert (run.complete, run.problems) == (True, ())
    *short, long, wide, last = run.rows
    assert [row["loss"] for row in short] == [step / 8 for step in range(250)]
    assert [len(row["pad"]) for row in short] == [step * 13 % 1009 for step in range(250)]
    assert long["pad"] == "y" * 100_000
    assert [wide[f"hessian/eigenvalue_{index:04}"] for index in range(2000)] == [
        index / 7 for index in range(2000)
    ]
    assert last["loss"] == -2.0
    kinds = [kind for _, _, kind in chunk_spans(many_sizes.read_bytes())]
    assert {1, 2, 3, 4} == set(kinds)


@pytest.mark.parametrize("name", ["fifty_steps", "odd_values", "many_sizes"])
def test_agrees_with_the_reader_of_wandb(name: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(name)
    run = read_offline_run(file)
    assert as_printed(run.rows) == inspected_rows(file)
    summary = json.loads(inspected(file, "--summary"))
    assert (run.run_id, run.project, run.name, run.exit_code) == (
        summary["run_id"],
        summary["project"],
        summary["name"],
        summary["exit_code"],
    )
    assert as_printed(run.config) == summary["config"]
    assert as_printed(run.summary) == summary["summary"]


def test_a_run_is_found_from_every_folder_around_it(fifty_steps: Path) -> None:
    run_folder = fifty_steps.parent
    for path in (run_folder, run_folder.parent, run_folder.parent.parent, str(run_folder)):
        assert len(read_offline_run(path).rows) == STEPS


def test_cut_at_every_byte_of_the_end(fifty_steps: Path, tmp_path: Path) -> None:
    data = fifty_steps.read_bytes()
    whole = read_offline_run(fifty_steps).rows
    ends = {end for _, end, _ in chunk_spans(data)}
    for size in range(len(data) - 200, len(data)):
        run = read_bytes(data[:size], tmp_path)
        assert run.rows == whole[: len(run.rows)]
        assert run.complete == (size in ends)
        assert bool(run.problems) != run.complete
        assert run.exit_code is None


def test_cut_anywhere_keeps_every_row_before_the_cut(many_sizes: Path, tmp_path: Path) -> None:
    data = many_sizes.read_bytes()
    whole = read_offline_run(many_sizes).rows
    ends = {end for _, end, kind in chunk_spans(data) if kind in (1, 4)} | {len(FILE_HEADER)}
    for end in list(ends):
        if (padding := -end % BLOCK) < 7:
            ends.update(range(end, end + padding + 1))
    near_blocks = [
        block + shift for block in range(BLOCK, len(data), BLOCK) for shift in range(-8, 9)
    ]
    for size in [*near_blocks, *range(len(FILE_HEADER), len(data), 9973)]:
        run = read_bytes(data[:size], tmp_path)
        assert run.rows == whole[: len(run.rows)]
        assert run.complete == (size in ends)
        assert bool(run.problems) != run.complete


def test_a_flipped_bit_costs_one_record(fifty_steps: Path, tmp_path: Path) -> None:
    data = fifty_steps.read_bytes()
    whole = read_offline_run(fifty_steps)
    for position in range(len(FILE_HEADER), len(data), 23):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        run = read_bytes(bytes(damaged), tmp_path)
        assert run.problems
        kept = {row["_step"] for row in run.rows}
        assert len(kept) >= STEPS - 1
        assert run.rows == [row for row in whole.rows if row["_step"] in kept]


@pytest.mark.parametrize("byte", range(7))
def test_a_flipped_bit_in_the_header_of_a_record(
    byte: int, fifty_steps: Path, tmp_path: Path
) -> None:
    data = fifty_steps.read_bytes()
    whole = read_offline_run(fifty_steps).rows
    spans = chunk_spans(data)
    begin, end, _ = spans[len(spans) // 2]
    for bit in range(8):
        damaged = bytearray(data)
        damaged[begin + byte] ^= 1 << bit
        run = read_bytes(bytes(damaged), tmp_path)
        assert len(run.rows) >= len(whole) - 1
        assert run.complete
        assert run.problems == (f"bytes {begin} to {end} do not match their checksum, left out",)


def test_damage_inside_a_long_record_names_it_once(many_sizes: Path, tmp_path: Path) -> None:
    data = bytearray(many_sizes.read_bytes())
    whole = read_offline_run(many_sizes).rows
    middle = next(begin for begin, _, kind in chunk_spans(bytes(data)) if kind == 3)
    data[middle + 5000] ^= 1
    run = read_bytes(bytes(data), tmp_path)
    assert len(run.problems) == 2
    assert "is not whole" in run.problems[1]
    assert len(run.rows) >= len(whole) - 1
    assert run.complete


def test_keeps_at_least_what_wandb_keeps_of_a_damaged_file(
    many_sizes: Path, tmp_path: Path
) -> None:
    data = bytearray(many_sizes.read_bytes())
    for position in range(10_000, len(data), 50_000):
        data[position] ^= 4
    run = read_bytes(bytes(data), tmp_path)
    theirs = inspected_rows(tmp_path / "run-copy.wandb")
    assert len(run.rows) > len(theirs) > 0
    assert all(row in run.rows for row in theirs)


def test_a_live_run_can_be_read(tmp_path: Path) -> None:
    with recording(tmp_path) as run:
        for step in range(40):
            run.log({f"hessian/eigenvalue_{index}": step + index / 7 for index in range(300)})
        deadline = time.monotonic() + 20
        live = read_offline_run(tmp_path)
        while not live.rows and time.monotonic() < deadline:
            time.sleep(0.05)
            live = read_offline_run(tmp_path)
    finished = read_offline_run(tmp_path)
    assert live.rows
    assert live.exit_code is None
    assert bool(live.problems) != live.complete
    assert live.rows == finished.rows[: len(live.rows)]
    assert len(finished.rows) == 40
    assert (finished.complete, finished.exit_code) == (True, 0)


def test_zeros_that_a_crash_left_at_the_end(fifty_steps: Path, tmp_path: Path) -> None:
    run = read_bytes(fifty_steps.read_bytes() + bytes(2 * BLOCK), tmp_path)
    assert len(run.rows) == STEPS
    assert run.problems
    assert not run.complete


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; pass the folder"):
        read_offline_run(tmp_path / "offline-run-nowhere")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.wandb file in .*; pass a run folder"):
        read_offline_run(tmp_path)


@pytest.mark.parametrize("inner", ["", "offline-run-1-{}/", "wandb/run-1-{}/"])
def test_two_runs_are_listed(inner: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        file = tmp_path / inner.format(name) / f"run-{name}.wandb"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FILE_HEADER)
    with pytest.raises(ValueError, match=r"2 W&B runs, pass one of them: .*a\.wandb, .*b\.wandb"):
        read_offline_run(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        read_bytes(b"", tmp_path)


@pytest.mark.parametrize(
    "data",
    [b":W&", b"{}", b"\x1f\x8b" + bytes(100), b":W&B" + struct.pack("<HB", 0xBEEF, 0) + bytes(99)],
    ids=["too short", "json", "gzip", "wrong magic"],
)
def test_a_file_of_another_kind(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a W&B run: it begins with"):
        read_bytes(data, tmp_path)

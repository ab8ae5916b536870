"""A run that is made to hurt costs itself at most: the good ones beside it are reported."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import events
from support.report_runs import logged, write_csv_run
from support.wandb_files import framed, history_record
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_hessian import load_runs
from lightning_hessian.histories.load import RunLeftOutWarning
from lightning_hessian.histories.parallel import Progress, map_runs
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.results import UnreadableFileError, bounds, load_spectrum
from lightning_hessian.results.outside import parse_json, printable
from lightning_hessian.tracking.loggers import write_text
from lightning_hessian.tracking.spectra import encode_spectrum

wandb_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

SECONDS = 20.0
HEADER = "step,val_loss,hessian/d_ks\n"
GOOD = HEADER + "".join(f"{k},{1 / (k + 1)},0.{k}\n" for k in range(9))


def good_runs(folder: Path) -> None:
    for seed in range(2):
        write_csv_run(folder / f"good{seed}", logged(seed, 6), {"seed": seed})


def reported(folder: Path) -> Any:
    """The table of a folder, read within the time that is allowed, with the good runs in it."""
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunLeftOutWarning)
        table = load_runs(folder, cache=False, workers=1)
    assert time.monotonic() - begun < SECONDS
    good = [run for run in table if "/good" in run.source]
    assert [run.config for run in good] == [{"seed": 0}, {"seed": 1}]
    for seed, run in enumerate(good):
        assert run.series("val_loss").tolist() == [row["val_loss"] for row in logged(seed, 6)]
    return table


def csv_run(folder: Path, text: str = GOOD, hparams: str = "") -> None:
    (folder / "metrics.csv").write_text(text)
    if hparams:
        (folder / "hparams.yaml").write_text(hparams)


def offline_run(folder: Path, *records: Any) -> None:
    (folder / "run-bad.wandb").write_bytes(framed(records))


def raw_value(key: str, text: str) -> Any:
    record = history_record(0, val_loss=1.0)
    record.history.item.add(key=key, value_json=text)
    return record


def config_record(keys: list[str], text: str) -> Any:
    record = wandb_pb2.Record()
    record.run.config.update.add(nested_key=keys, value_json=text)
    return record


def event_run(folder: Path, dtype: int, *sizes: int, values: int = 1) -> None:
    event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    event = event_pb2.Event(step=3)
    value = event.summary.value.add(tag="z")
    value.tensor.dtype = dtype
    for size in sizes:
        value.tensor.tensor_shape.dim.add(size=size)
    value.tensor.float_val.extend([1.0] * values)
    data = events([event.SerializeToString()], masked_crc32c)
    (folder / "events.out.tfevents.1.h").write_bytes(data)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(8)
)

DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "CSV field": (lambda d: csv_run(d, GOOD.replace("0,1.0", "0," + "x" * 200_000)), "no number"),
    "CSV stray quote": (
        lambda d: csv_run(d, GOOD + '9,"0.1,0.2\n' + "10,0.1,0.2\n" * 20_000),
        "line 11 left out",
    ),
    "CSV ten thousand bad lines": (lambda d: csv_run(d, GOOD + "1,2\n" * 10_000), "9950 more"),
    "JSON lists": (
        lambda d: offline_run(d, raw_value("a", "[" * 100_000 + "]" * 100_000)),
        "nested deeper",
    ),
    "JSON objects": (
        lambda d: offline_run(d, raw_value("a", '{"a":' * 500 + "1" + "}" * 500)),
        "nested deeper",
    ),
    "JSON integer": (lambda d: offline_run(d, raw_value("x", "9" * 400)), "308 digits"),
    "JSON integer of 10,000 digits": (lambda d: offline_run(d, raw_value("x", "9" * 10**4)), "'x'"),
    "JSON integer in an object": (
        lambda d: offline_run(d, raw_value("x", '{"y": ' + "9" * 400 + "}")),
        "308 digits",
    ),
    "one long key over many leaves": (
        lambda d: offline_run(
            d, raw_value("k", json.dumps({"k" * 10**5: {str(n): n for n in range(10**4)}}))
        ),
        "longer than 1000",
    ),
    "config keys": (
        lambda d: offline_run(d, history_record(0, a=1), config_record(["a"] * 5000, "1")),
        "nested deeper",
    ),
    "config integer": (
        lambda d: offline_run(d, history_record(0, a=1), config_record(["n"], "9" * 400)),
        "308 digits",
    ),
    "YAML that refers to itself": (lambda d: csv_run(d, hparams="a: &a\n  b: *a\n"), "to itself"),
    "YAML flow": (lambda d: csv_run(d, hparams="[" * 20_000), "nested deeper"),
    "YAML blocks": (
        lambda d: csv_run(d, hparams="\n".join(" " * k + "a:" for k in range(400))),
        "nested deeper",
    ),
    "YAML alias bomb": (lambda d: csv_run(d, hparams=BOMB), "unfolds"),
    "YAML of a megabyte": (lambda d: csv_run(d, hparams="a: 1\n" * 250_000), "bytes"),
    "TensorBoard claim": (lambda d: event_run(d, 1, 1 << 50), "claims"),
    "TensorBoard claims": (lambda d: event_run(d, 1, 1 << 30, 1 << 30), "claims"),
    "TensorBoard dtype": (lambda d: event_run(d, 99, 1), "left out"),
    "TensorBoard too many values": (lambda d: event_run(d, 1, 1, values=3), "left out"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_within_a_run_costs_that_part_and_is_named(case, tmp_path):
    make, words = DAMAGED[case]
    good_runs(tmp_path)
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad")
    table = reported(tmp_path)
    told = " ".join(table.problems)
    assert words in told
    assert len(table.problems) <= bounds.NUM_PROBLEMS + 5
    assert len(told) < 40_000
    if case.startswith("CSV"):
        (bad,) = [run for run in table if "bad" in run.source]
        assert bad.series("val_loss")[1:9] == pytest.approx([1 / (k + 1) for k in range(1, 9)])


def elsewhere(file: Path, target: str) -> None:
    file.symlink_to(target)


NAMES = ("metrics.csv", "run-bad.wandb", "events.out.tfevents.1.h")
NOT_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pipe": (os.mkfifo, "is a pipe"),
    "a socket": (lambda file: socket.socket(socket.AF_UNIX).bind(str(file)), "is a socket"),
    "a link to a device": (lambda file: elsewhere(file, "/dev/zero"), "link out of its folder"),
    "a link out of the folder": (lambda file: elsewhere(file, "/etc/hostname"), "link out of"),
    "a link to nothing": (lambda file: elsewhere(file, "gone"), "gone|No such file|does not exist"),
    "a link to itself": (lambda file: elsewhere(file, file.name), "symbolic links|does not exist"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", NOT_FILES)
def test_what_is_no_regular_file_of_the_run_is_left_out(case, name, tmp_path, monkeypatch):
    make, words = NOT_FILES[case]
    good_runs(tmp_path)
    (tmp_path / "bad").mkdir()
    monkeypatch.chdir(tmp_path / "bad")  # the path of a socket has an end
    make(Path(name))
    monkeypatch.chdir(tmp_path)
    table = reported(tmp_path)
    (skipped,) = table.skipped
    assert str(tmp_path / "bad") in skipped
    assert re.search(words, skipped)
    with pytest.warns(RunLeftOutWarning, match="1 of 3 runs are left out: .*bad"):
        load_runs(tmp_path, cache=False, workers=1)
    with pytest.raises(ValueError, match=r"Not one of 1 run.*bad"):
        load_runs(tmp_path / "bad", cache=False)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda f: f.symlink_to("/etc/hostname")])
def test_hyperparameters_that_are_no_file_cost_themselves(make, tmp_path):
    good_runs(tmp_path)
    (tmp_path / "bad").mkdir()
    csv_run(tmp_path / "bad")
    make(tmp_path / "bad" / "hparams.yaml")
    table = reported(tmp_path)
    assert len(table) == 3
    assert "hparams.yaml left out" in " ".join(table.problems)


def test_a_row_with_a_key_of_its_own_each_makes_no_table_of_gigabytes(tmp_path):
    good_runs(tmp_path)
    (tmp_path / "bad").mkdir()
    offline_run(tmp_path / "bad", *(history_record(k, **{f"key{k}": k}) for k in range(12_000)))
    (skipped,) = reported(tmp_path).skipped
    assert "12000 keys in 12000 rows" in skipped


def test_names_are_of_a_length_and_of_letters_that_files_take(tmp_path):
    good_runs(tmp_path)
    for number, name in enumerate(["n" * 300, "a\x1b[2Jb\nc"]):
        record = config_record(["text"], '"\\ud800"')
        record.run.display_name, record.run.run_id = name, f"id{number}"
        (tmp_path / f"bad{number}").mkdir()
        offline_run(tmp_path / f"bad{number}", record, history_record(0, val_loss=1.0))
    table = reported(tmp_path)
    table.write_csv(tmp_path / "table.csv")
    for run in table:
        assert len(run.name) <= bounds.NAME_LENGTH
        assert run.name.isprintable()
        for value in run.config.values():
            str(value).encode()


def test_folders_deeper_than_the_bound_end_the_walk_and_not_the_report(tmp_path):
    good_runs(tmp_path)
    here = tmp_path
    for _ in range(bounds.FOLDER_DEPTH + 3):
        here = here / "d"
    here.mkdir(parents=True)
    csv_run(here)
    with pytest.warns(UserWarning, match="folders more than 32 below"):
        assert len(reported(tmp_path)) == 2


def test_what_lightning_writes_into_hyperparameters_is_read(tmp_path):
    """Lists given twice (aliases), tuples and enums; none of them runs code."""
    from enum import Enum

    class Kind(Enum):
        ADAM = "adam"

    sizes = [8, 16]
    given = {"a": sizes, "b": sizes, "betas": (0.9, 0.99), "optimizer": Kind.ADAM, "lr": 0.1}
    folder = write_csv_run(tmp_path / "logs", logged(0, 5), given)
    (run,) = load_runs(folder, cache=False)
    assert (run.config["a"], run.config["b"]) == ("[8, 16]", "[8, 16]")
    assert (run.config["betas"], run.config["lr"]) == ("[0.9, 0.99]", 0.1)
    assert run.problems == ()
    mark = tmp_path / "executed"
    (folder / "hparams.yaml").write_text(
        f"lr: 1\nx: !!python/object/apply:os.system ['touch {mark}']\n"
    )
    (run,) = load_runs(folder, cache=False)
    assert run.config["lr"] == 1
    assert not mark.exists()


# Processes --------------------------------------------------------------------------------------


def dies(item: int) -> int:
    if item == 3:
        os._exit(9)
    return item


def hangs(item: int) -> int:
    if item == 3:
        time.sleep(600)
    return item


@pytest.mark.parametrize(("work", "why"), [(dies, "exit code 9"), (hangs, "more than 2 s")])
def test_a_process_that_dies_or_hangs_costs_its_run(work, why):
    told: dict[int, str] = {}

    def failed(item: int, reason: str) -> int:
        told[item] = reason
        return -1

    begun = time.monotonic()
    options: dict[str, Any] = {"what": "read", "progress": Progress(False), "workers": 2}
    found = map_runs(work, range(14), seconds=2.0, failed=failed, **options)
    assert time.monotonic() - begun < 5 * SECONDS  # fresh interpreters take seconds to start
    assert found == [-1 if item == 3 else item for item in range(14)]
    assert why in told.pop(3)
    assert told == {}
    with pytest.raises(RuntimeError, match=why):
        map_runs(work, range(14), seconds=2.0, **options)


def raises(item: int) -> int:
    if item == 3:
        raise KeyError("three")
    return item


def test_an_exception_in_a_process_is_raised_here():
    with pytest.raises(KeyError, match="three"):
        map_runs(raises, range(14), what="read", progress=Progress(False), workers=2)


# Spectra ----------------------------------------------------------------------------------------


def test_a_torn_line_of_spectra_costs_that_line(tmp_path):
    for step in range(6):
        write_text(tmp_path, "spectra/hessian", encode_spectrum([4.0, 2.0, step / 8]), step)
    file = tmp_path / "spectra_hessian.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    torn = {
        1: whole[1][: len(whole[1]) // 2] + "\n",
        2: '{"step": 1e999, "spectra/hessian": ""}\n',
        3: "[" * 5000 + "\n",
        4: '{"step": "4"}\n',
    }
    file.write_text("".join(torn.get(k, line) for k, line in enumerate(whole))[:-9])
    with pytest.warns(UserWarning, match="5 spectra left out: .*line 2"):
        found = read_spectra(tmp_path)["hessian"]
    assert [step for step, _ in found] == [0]
    np.testing.assert_array_equal(found[0][1].eigenvalues, [4.0, 2.0, 0.0])
    file.write_text("nothing\n")
    with pytest.raises(UnreadableFileError, match="not one spectrum"):
        read_spectra(tmp_path)


def test_a_spectrum_takes_the_memory_of_its_file_whatever_it_claims(tmp_path):
    """A compressed file of zeros, and an array of 60 bytes that claims 4 PiB."""
    import zipfile

    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, eigenvalues=np.zeros(10**7), about=np.array("{}"))
    with pytest.raises(UnreadableFileError, match="compressed"):
        load_spectrum(bomb)
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({1 << 49},), }}".ljust(117)
    claim = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + b"\n" + bytes(60)
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("eigenvalues.npy", claim)
    with pytest.raises(UnreadableFileError, match="not that of its header"):
        load_spectrum(tmp_path / "claim.npz")


def test_json_within_the_bounds_is_what_json_reads():
    deep = "[" * bounds.DEPTH + "]" * bounds.DEPTH
    for text in ('{"a": [1, NaN, "[[["]}', deep, "9" * 300):
        assert repr(parse_json(text)) == repr(json.loads(text))
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json(f"[{deep}]")
    assert printable("ünï/κey 😀") == "ünï/κey 😀"

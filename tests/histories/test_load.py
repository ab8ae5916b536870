"""Runs that wandb, Lightning and TensorBoard wrote, read into one table; damaged ones too."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.report_runs import logged, recording, write_csv_run

from lightning_hessian import load_runs
from lightning_hessian.histories import load
from lightning_hessian.histories.run_table import columns_of

KEYS = ("val_loss", "hessian/d_ks", "hessian/lambda_1")


def assert_holds(run, rows) -> None:
    assert run.steps.tolist() == [row["trainer/global_step"] for row in rows]
    for key in KEYS:
        expected = [row.get(key, math.nan) for row in rows]
        assert run.series(key) == pytest.approx(expected, nan_ok=True)


@pytest.fixture(scope="module")
def offline(own_wandb, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    for seed, name in enumerate(["first", "second"]):
        config = {"lr": 0.1 * (seed + 1), "model": {"width": 8}}
        with recording(folder, project="p", name=name, id=name, config=config) as run:
            for row in logged(seed):
                run.log(row)
    return folder


def test_offline_runs(offline):
    table = load_runs(offline, cache=False)
    assert [run.name for run in table] == ["first", "second"]
    for seed, run in enumerate(table):
        assert_holds(run, logged(seed))
        assert run.config == {"lr": 0.1 * (seed + 1), "model.width": 8}
        assert (run.kind, run.run_id, run.problems) == ("offline", run.name, ())
    assert table.problems == ()
    assert table.config_keys() == ["lr", "model.width"]


def test_a_truncated_and_a_damaged_offline_run(offline, tmp_path):
    """Every row that is whole is used, and what is not is named; so is a file beyond reading."""
    file = next(offline.glob("wandb/*-first/*.wandb"))
    data = bytearray(file.read_bytes())
    half = len(data) // 2

    def copy(name: str, content: bytes) -> None:
        folder = tmp_path / f"offline-run-20260101_000000-{name}"
        folder.mkdir()
        (folder / f"run-{name}.wandb").write_bytes(content)

    copy("cut", bytes(data[:half]))
    data[half] ^= 16
    copy("flipped", bytes(data))
    copy("nothing", b"")
    copy("other", b"no W&B file at all")
    table = load_runs(tmp_path, cache=False)
    cut, flipped = table.runs
    rows = logged(0)
    assert 0 < len(cut) < 30
    assert_holds(cut, rows[: len(cut)])
    assert len(flipped) in (29, 30)
    assert_holds(flipped, [r for r in rows if r["trainer/global_step"] in flipped.steps])
    assert any("ends inside the record" in problem for problem in cut.problems)
    assert any("do not match their checksum" in problem for problem in flipped.problems)
    assert len(table.skipped) == 2
    assert any("is empty" in text for text in table.skipped)
    assert any("is not a W&B run" in text for text in table.skipped)
    assert len({run.name for run in table}) == 2


def test_the_later_part_of_a_resumed_run_wins(own_wandb, tmp_path, monkeypatch):
    for part, (begin, end, shift) in enumerate([(0, 20, 0.0), (15, 30, 100.0)]):
        with recording(tmp_path, project="p", id="again", config={"part": part}) as run:
            for row in logged(0)[begin:end]:
                run.log(row | {"val_loss": row["val_loss"] + shift})
        # wandb names the folder by the second.
        for folder in (tmp_path / "wandb").glob("offline-run-*-again"):
            if not folder.name.startswith("offline-run-2000"):
                folder.rename(folder.with_name(f"offline-run-2000010{part + 1}_000000-again"))
    (run,) = load_runs(tmp_path, cache=False)
    expected = [
        row | {"val_loss": row["val_loss"] + (100.0 if k >= 15 else 0.0)}
        for k, row in enumerate(logged(0))
    ]
    assert_holds(run, expected)
    assert run.config == {"part": 1}


def test_csv_runs_of_lightning(tmp_path):
    folder = write_csv_run(tmp_path / "logs", logged(3), {"lr": 0.5, "sizes": [8, 16]})
    (run,) = load_runs(folder, cache=False)
    assert_holds(run, logged(3))
    assert run.config == {"lr": 0.5, "sizes": "[8, 16]"}
    assert (run.kind, run.name, run.problems) == ("csv", "logs/version_0", ())
    (file,) = load_runs(folder / "metrics.csv", cache=False)
    assert_holds(file, logged(3))


def test_a_truncated_and_a_damaged_csv(tmp_path):
    folder = write_csv_run(tmp_path / "logs", logged(4), {"lr": 1})
    file = folder / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace(",", "", 1)
    lines[7] = lines[7].replace(".", "\x8e", 1)
    file.write_bytes("".join(lines).encode("latin-1")[:-9])
    (folder / "hparams.yaml").write_text("lr: [1")
    (run,) = load_runs(folder, cache=False)
    rows = logged(4)
    kept = [r for k, r in enumerate(rows) if k not in (2, 29)]
    assert run.steps.tolist() == [r["trainer/global_step"] for r in kept]
    lost = [key for key in ("epoch", *KEYS) if math.isnan(run.series(key)[5])]
    assert len(lost) == 1
    told = " ".join(run.problems)
    for words in ("line 31 is not whole", "line 4 has", "line 8", "is no number", "hparams.yaml"):
        assert words in told
    assert len(run.problems) == 4


def test_tensorboard_runs(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    pytest.importorskip("tensorboard")
    for seed in (5, 6):
        writer = tensorboard.SummaryWriter(str(tmp_path / f"run{seed}"))
        for row in logged(seed):
            for key in KEYS:
                writer.add_scalar(key, row[key], int(row["trainer/global_step"]))
        writer.close()
    table = load_runs(tmp_path, cache=False)
    for seed, run in zip((5, 6), table, strict=True):
        expected = [{k: np.float32(v) for k, v in row.items()} for row in logged(seed)]
        assert_holds(run, expected)
        assert (run.kind, run.problems) == ("tensorboard", ())


def test_a_truncated_and_a_damaged_event_file(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    writer = tensorboard.SummaryWriter(str(tmp_path))
    for step in range(40):
        writer.add_scalar("val_loss", step / 4, step)
    writer.close()
    (file,) = tmp_path.glob("events*")
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-5])
    (run,) = load_runs(tmp_path, cache=False)
    assert run.series("val_loss").tolist() == [step / 4 for step in range(39)]
    assert "ends inside the event" in run.problems[0]
    theirs = [e for e in EventFileLoader(str(file)).Load() if e.HasField("summary")]
    assert len(theirs) == 39
    place = bytes(data).index(b"val_loss", len(data) // 2)
    data[place] ^= 1
    file.write_bytes(data)
    (run,) = load_runs(tmp_path, cache=False)
    assert len(run) == 39
    assert "does not match its checksum" in run.problems[0]


def test_the_last_value_of_a_step_wins_key_by_key():
    steps, columns = columns_of(
        [
            {"step": 1, "a": 1.0, "b": "NaN", "name": "text"},
            {"step": 2, "a": 2.0},
            {"b": 7},
            {"step": 1, "a": 3.0},
            {"step": 0, "b": True, "none": None},
        ]
    )
    assert steps.tolist() == [0.0, 1.0, 2.0]
    assert columns["a"] == pytest.approx([math.nan, 3.0, 2.0], nan_ok=True)
    assert columns["b"] == pytest.approx([1.0, math.nan, 7.0], nan_ok=True)
    assert set(columns) == {"a", "b"}


def test_the_tidy_rows_are_what_was_logged(offline, tmp_path):
    table = load_runs(offline, cache=False)
    table.write_csv(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert float(rows[31]["hessian/d_ks"]) == logged(1)[1]["hessian/d_ks"]
    assert (rows[31]["run"], rows[31]["config.lr"], rows[31]["step"]) == ("second", "0.2", "20.0")
    first = next(table.rows())
    assert first["config.model.width"] == 8
    assert first["val_loss"] == logged(0)[0]["val_loss"]


def test_many_runs_in_processes_and_from_the_cache(tmp_path, monkeypatch, capsys):
    for seed in range(14):
        write_csv_run(tmp_path / "logs" / f"run{seed:02}", logged(seed, 6), {"seed": seed})
    cache = tmp_path / "cache"
    fresh = load_runs(tmp_path / "logs", cache=cache, workers=2, progress=True)
    assert "read: 14 of 14 runs" in capsys.readouterr().err
    assert len(list(cache.glob("*.npz"))) == 14
    monkeypatch.setattr(load, "read_local_run", None)  # reading again would fail
    kept = load_runs(tmp_path / "logs", cache=cache, workers=1)
    for seed, (a, b) in enumerate(zip(fresh, kept, strict=True)):
        assert_holds(a, logged(seed, 6))
        assert_holds(b, logged(seed, 6))
        assert (a.config, a.name, a.problems) == (b.config, b.name, b.problems)
    monkeypatch.undo()
    changed = tmp_path / "logs" / "run03" / "version_0" / "metrics.csv"
    changed.write_text(changed.read_text().replace("\n", "\n", 1) + "99,1,2,3,4\n")
    again = load_runs(tmp_path / "logs", cache=cache, workers=1)
    assert [len(run) for run in again] == [7 if k == 3 else 6 for k in range(14)]
    for file in cache.glob("*.npz"):
        file.write_bytes(b"broken")
    assert len(load_runs(tmp_path / "logs", cache=cache)) == 14


def test_several_sources_at_once_each_run_once(offline, tmp_path):
    folder = write_csv_run(tmp_path / "logs", logged(3), {})
    table = load_runs([folder, offline, offline / "wandb", str(folder)], cache=False)
    assert sorted(run.kind for run in table) == ["csv", "offline", "offline"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        write_csv_run(tmp_path / folder / "logs", logged(0), {})
    names = [run.name for run in load_runs(tmp_path, cache=False)]
    assert len(set(names)) == 2
    assert all(name.startswith("logs/version_0") for name in names)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder, and a W&B path is"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no run: no \.wandb file"):
        load_runs(tmp_path)
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=r"Not one of 1 run.*is empty"):
        load_runs(tmp_path, cache=False)
    with pytest.raises(ValueError, match=r"source=.*run folder"):
        load_runs([])


def test_a_missing_key_names_the_nearest(offline):
    table = load_runs(offline, cache=False)
    with pytest.raises(ValueError, match=r"'valloss'.*None of the 2 run.*nearest: val_loss"):
        table.require("valloss")
    with pytest.raises(ValueError, match=r"'d_ks'.*nearest: hessian/d_ks"):
        table.require("d_ks")
    with pytest.raises(ValueError, match=r"'width'.*in its config; nearest:.*model.width"):
        table.require("width", config=True)


def test_json_survives_in_the_config(tmp_path):
    folder = write_csv_run(tmp_path / "logs", logged(0), {"betas": [0.9, 0.99]})
    (run,) = load_runs(folder, cache=False)
    assert json.loads(run.config["betas"]) == [0.9, 0.99]

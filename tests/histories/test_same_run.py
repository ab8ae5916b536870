"""A run that several loggers wrote, or that was copied, counts once; two runs stay two."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.report_runs import logged, write_csv_run
from support.runs import finished, measuring, train, wandb_logger

from lightning_hessian import correlation_report, load_runs, write_report
from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.histories.same_run import each_run_once, identities_beside

STATISTICS, MONITORS = ("hessian/d_ks", "hessian/lambda_1"), ("val_loss",)


def record(name: str, seed: int, rows: slice = slice(None), **more: Any) -> RunRecord:
    listed = logged(seed, 20)
    steps = np.array([row["trainer/global_step"] for row in listed], dtype=float)
    columns = {
        key: np.array([row[key] for row in listed])[rows] for key in (*STATISTICS, *MONITORS)
    }
    return RunRecord(name, name, f"folder/{name}", "csv", {}, steps[rows], columns, **more)


def once(*runs: RunRecord) -> RunTable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return each_run_once(RunTable(runs), STATISTICS, MONITORS)


def names(table: RunTable) -> list[str]:
    return [run.name for run in table]


def changed(run: RunRecord, key: str, by: float = 1e-3, where: Any = slice(None)) -> RunRecord:
    column = run.columns[key].copy()
    column[where] += by
    return replace(run, columns={**run.columns, key: column})


# By their series ------------------------------------------------------------------------------


def test_five_seeds_with_two_loggers_are_five_runs_in_the_report(tmp_path):
    for seed in range(5):
        write_csv_run(tmp_path / "csv" / f"s{seed}", logged(seed, 12), {})
    shutil.copytree(tmp_path / "csv", tmp_path / "copies")
    alone = correlation_report(load_runs(tmp_path / "csv", cache=False), workers=1)
    with pytest.warns(UserWarning, match=r"10 records are 5 runs: .*copies|s0"):
        both = correlation_report(load_runs(tmp_path, cache=False), workers=1)
    assert len(both.table) == 5
    assert [pair.p_value for pair in both.across] == [pair.p_value for pair in alone.across]
    assert [over.sign_p for over in both.over] == [over.sign_p for over in alone.over]
    write_report(both, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("counted once") == 5
    assert "5 runs, " in text


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_equal_to_float32_is_equal(precision):
    one = record("one", 0)
    columns = {key: v.astype(precision).astype(float) for key, v in one.columns.items()}
    assert names(once(one, replace(one, name="two", columns=columns))) == ["one"]


def test_a_copy_from_before_the_end_is_the_same_run_and_the_longer_one_is_kept():
    table = once(record("early", 0, slice(0, 12)), record("whole", 0))
    assert names(table) == ["whole"]
    assert len(table.runs[0]) == 20
    assert "early" in table.copies[0]


@pytest.mark.parametrize("key", [*STATISTICS, *MONITORS])
def test_one_other_value_makes_another_run(key):
    one = record("one", 0)
    assert names(once(one, changed(replace(one, name="two"), key, where=19))) == ["one", "two"]


def test_runs_that_part_or_lack_what_is_monitored_stay_two():
    one, two = record("one", 0), record("two", 0)
    for key in (*STATISTICS, *MONITORS):
        two = changed(two, key, where=slice(10, None))  # one seed, another schedule from there on
    assert names(once(one, two)) == ["one", "two"]
    bare = replace(one, name="two", columns={k: v for k, v in one.columns.items() if "/" in k})
    assert names(once(one, bare)) == ["one", "two"]
    assert names(once(one, record("two", 1), record("three", 2))) == ["one", "two", "three"]


def test_extra_columns_and_rows_without_statistics_make_no_difference():
    one = record("one", 0)
    steps = np.sort(np.concatenate([one.steps, one.steps - 5]))
    columns = {key: np.full(40, np.nan) for key in one.columns} | {"train_loss": np.ones(40)}
    for key, values in one.columns.items():
        columns[key][1::2] = values
    two = replace(one, name="two", steps=steps, columns=columns)
    assert names(once(one, two)) == ["one"]


# By their identity ----------------------------------------------------------------------------

ID, OTHER = "0" * 32, "1" * 32


def test_the_parts_of_a_resumed_run_are_put_together():
    before = record("before", 0, slice(0, 8), identities=(ID,))
    after = record("after", 0, slice(8, 20), identities=(ID,))
    (run,) = once(before, after).runs
    whole = record("whole", 0)
    assert run.steps.tolist() == whole.steps.tolist()
    for key, values in whole.columns.items():
        assert run.series(key).tolist() == values.tolist()
    assert len(once(before, replace(after, identities=(OTHER,)))) == 2


def test_a_logger_with_other_keys_is_known_by_the_identity():
    one = record("one", 0, identities=(ID,))
    prefixed = {f"x-{key}": values for key, values in one.columns.items()}
    two = replace(one, name="two", columns=prefixed)
    assert names(once(two, one)) == ["one"]


def test_two_runs_from_one_checkpoint_stay_two_and_it_is_told():
    one = record("one", 0, identities=(ID,))
    two = changed(replace(one, name="two"), "val_loss", where=slice(10, None))
    table = once(one, two)
    assert names(table) == ["one", "two"]
    assert "not independent" in table.copies[0]


@pytest.mark.parametrize(
    "loggers", [("csv", "wandb"), ("csv", "tensorboard"), ("wandb", "tensorboard")]
)
def test_a_real_fit_with_two_loggers_is_one_run(loggers, tmp_path, own_wandb, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    made = {
        "csv": lambda: CSVLogger(tmp_path / "csv"),
        "wandb": lambda: wandb_logger(tmp_path / "wandb_runs"),
        "tensorboard": lambda: TensorBoardLogger(tmp_path / "tensorboard"),
    }
    (tmp_path / "wandb_runs").mkdir()
    used = [made[name]() for name in loggers]
    callback = measuring(figures=100)
    train(tmp_path, [callback], used)
    for logger in used:
        if hasattr(logger, "_wandb_init"):
            finished(logger, tmp_path / "wandb_runs")
    table = load_runs(tmp_path, cache=False)
    identity = callback.state_dict()["identity"]
    assert [run.identities for run in table] == [(identity,)] * 2
    with pytest.warns(UserWarning, match="2 records are 1 run:"):
        report = correlation_report(table, workers=1)
    assert len(report.table) == 1


def test_every_fit_has_its_identity_and_a_resume_keeps_it(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    def fit(name: str, **more: Any) -> tuple[str, Path]:
        callback, logger = measuring(figures=100), CSVLogger(tmp_path / name)
        trainer = train(tmp_path, [callback], logger, **more)
        if not more.get("ckpt_path"):
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return callback.state_dict()["identity"], Path(logger.log_dir)

    first, folder = fit("first", epochs=2)
    second, _ = fit("second", epochs=1)
    resumed, continued = fit("resumed", epochs=4, ckpt_path=tmp_path / "first.ckpt")
    assert first == resumed != second
    assert identities_beside(folder) == identities_beside(continued) == (first,)
    with pytest.warns(UserWarning, match="2 records are 1 run:"):
        report = correlation_report(load_runs([folder, continued], cache=False), workers=1)
    (run,) = report.table.runs
    assert np.isfinite(run.series("hessian/d_ks")).sum() == 8


def test_files_that_hold_no_identity_are_passed_over(tmp_path):
    (tmp_path / "identity_a.jsonl").write_text(f'{{"identity/a": "{ID}"}}\n{{"torn')
    (tmp_path / "identity_b.jsonl").write_text(
        '[1]\n"x"\n{"identity/b": "<script>"}\n' + "[" * 9999
    )
    (tmp_path / "identity_c.jsonl").write_text("x" * 2**17)
    (tmp_path / "identity_d.jsonl").mkdir()
    assert identities_beside(tmp_path) == (ID,)

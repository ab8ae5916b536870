"""A sidecar among checkpoints of every kind: half-written, deleted, quick, sharded, resumed."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import trained

from lightning_hessian.cli import checkpoint_spectra
from lightning_hessian.cli.checkpoints import copy_checkpoint, read_checkpoint
from lightning_hessian.cli.main import main
from lightning_hessian.cli.run_end import End, Run
from lightning_hessian.cli.watching import Watch, looks_whole, version_of
from lightning_hessian.results import UnreadableFileError, load_spectrum

NAMES = ["--module", "support.trained:Net", "--data", "support.trained:Data"]
FEW = ["--num-eigenvalues", "2", "--trace-probes", "0", "--interval", "0.05", "--idle", "0.6"]


@pytest.fixture(scope="module")
def content(tmp_path_factory: Any) -> dict[str, Any]:
    """What Lightning writes into a checkpoint."""
    folder = tmp_path_factory.mktemp("content")
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(trained.Net(width=3), datamodule=trained.Data())
    trainer.save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True)


@pytest.fixture(autouse=True)
def as_urgent_as_before(monkeypatch: Any) -> None:
    """The sidecar stands back for the rest of its process, which here runs other tests."""
    monkeypatch.setattr(os, "nice", lambda _: 0)


def saved(content: dict[str, Any], file: Path, step: int, seed: int | None = None) -> Path:
    """Writes a checkpoint of a step; its weights are those of the seed, by default the step."""
    generator = torch.Generator().manual_seed(step if seed is None else seed)
    state = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in content["state_dict"].items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, "state_dict": state, "global_step": step}, file)
    times = (1_700_000_000 + step, 1_700_000_000 + step)
    os.utime(file, times)
    return file


def follow(folder: Path, *more: str, code: int = 0) -> Path:
    out = folder.with_name("out")
    arguments = ["measure", str(folder), "--follow", *NAMES, *FEW, "--out", str(out), *more]
    assert main(arguments) == code
    return out


def steps(out: Path) -> list[int]:
    with open(out / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def during(monkeypatch: Any, step: int, happens: Callable[[], Any]) -> None:
    """Lets something happen while the checkpoint of a step is being measured."""
    real = checkpoint_spectra.loading.batches_of
    seen = []

    def batches_of(module: Any, data: Any, options: Any) -> Any:
        if not seen and happens_now[0] == step:
            seen.append(step)
            happens()
        return real(module, data, options)

    happens_now = [0]
    module_of = checkpoint_spectra.loading.module_of

    def remembered(cls: Any, found: Any, options: Any) -> Any:
        happens_now[0] = found.step
        return module_of(cls, found, options)

    monkeypatch.setattr(checkpoint_spectra.loading, "module_of", remembered)
    monkeypatch.setattr(checkpoint_spectra.loading, "batches_of", batches_of)


def test_the_newest_comes_first_and_what_is_left_is_said_and_measured(
    content, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    saved(content, folder / "a.ckpt", 3)
    later = [("b", 6), ("c", 9)]
    during(monkeypatch, 3, lambda: [saved(content, folder / f"{n}.ckpt", s) for n, s in later])
    out = follow(folder)
    told = capsys.readouterr().err
    assert "behind the run: b.ckpt left for when nothing newer is there, c.ckpt first" in told
    order = [told.index(f"{name}.ckpt: step") for name in "acb"]
    assert order == sorted(order)
    assert steps(out) == [3, 6, 9]


def test_a_checkpoint_that_is_deleted_is_no_error(content, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    first = saved(content, folder / "a.ckpt", 3)
    second = saved(content, folder / "b.ckpt", 6)
    # The one that is being measured, and one that waits.
    during(monkeypatch, 6, lambda: [first.unlink(), second.unlink()])
    out = follow(folder)
    assert steps(out) == [6]
    told = capsys.readouterr().err
    assert "deleted by the run before they could be measured: a.ckpt" in told


def test_a_half_written_checkpoint_is_waited_for(content, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    data = saved(content, tmp_path / "whole.ckpt", 6).read_bytes()
    folder.mkdir()
    (folder / "b.ckpt").write_bytes(data[: len(data) // 2])
    saved(content, folder / "a.ckpt", 3)
    during(monkeypatch, 3, lambda: (folder / "b.ckpt").write_bytes(data))
    assert steps(follow(folder)) == [3, 6]
    assert "not measured" not in capsys.readouterr().err


def test_one_that_is_half_written_when_the_run_ends_is_named(content, tmp_path, capsys):
    folder = tmp_path / "run"
    data = saved(content, folder / "a.ckpt", 3).read_bytes()
    (folder / "b.ckpt").write_bytes(data[: len(data) // 2])
    assert steps(follow(folder, code=1)) == [3]
    assert "1 could not be measured. b.ckpt" in capsys.readouterr().err


def test_a_copy_is_measured_once_and_an_overwritten_name_again(
    content, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    saved(content, folder / "a.ckpt", 3)
    last = folder / "last.ckpt"
    shutil.copy2(folder / "a.ckpt", last)
    during(monkeypatch, 3, lambda: saved(content, last, 6))
    out = follow(folder)
    assert steps(out) == [3, 6]
    names = sorted(path.name for path in (out / "spectra").iterdir())
    assert names == ["a.npz", "last.npz"]
    saved(content, last, 9)  # the sidecar is started again
    assert steps(follow(folder)) == [3, 6, 9]
    assert (out / "spectra" / "last-step=9.npz").exists()
    assert "2 measured before" in capsys.readouterr().err
    shutil.copy2(last, folder / "copy.ckpt")  # `measure` afterwards finds nothing to do
    assert main(["measure", str(folder), *NAMES, *FEW[:4], "--out", str(out)]) == 0
    assert "0 measured" in capsys.readouterr().err
    assert steps(out) == [3, 6, 9]


def test_a_resumed_run_that_comes_to_other_weights_is_measured_anew(content, tmp_path, capsys):
    folder = tmp_path / "run"
    saved(content, folder / "a.ckpt", 3)
    out = follow(folder)
    first = load_spectrum(out / "spectra" / "a.npz").eigenvalues
    saved(content, folder / "a-v1.ckpt", 3, seed=5)
    assert steps(follow(folder)) == [3]
    assert "other weights now" in capsys.readouterr().err
    assert load_spectrum(out / "spectra" / "a.npz").eigenvalues[0] != first[0]
    saved(content, folder / "other" / "a.ckpt", 3, seed=6)  # of another run
    follow(folder, code=1)
    assert "Follow the folder of one run" in capsys.readouterr().err


def test_a_measurement_that_was_stopped_goes_on_though_its_checkpoint_is_gone(
    content, tmp_path, capsys
):
    more = ["--loss", "support.trained:interrupted", "--hvp", "recompute", "--tol", "1e-9",
            "--num-eigenvalues", "4"]  # fmt: skip
    whole = saved(content, tmp_path / "whole" / "run" / "a.ckpt", 3)
    expected = load_spectrum(follow(whole.parent, *more) / "spectra" / "a.npz")
    path = saved(content, tmp_path / "run" / "a.ckpt", 3)
    trained.STOP_AFTER[:] = [3 * 6 + 10]  # in the middle: three batches to a product
    try:
        with pytest.raises(SystemExit) as stopped:
            follow(path.parent, *more)
    finally:
        trained.STOP_AFTER.clear()
    assert stopped.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    path.unlink()
    out = follow(path.parent, *more)
    assert "a.ckpt: going on with the measurement that was stopped" in capsys.readouterr().err
    found = load_spectrum(out / "spectra" / "a.npz")
    np.testing.assert_array_equal(found.eigenvalues, expected.eigenvalues)
    assert found.num_hvps == expected.num_hvps  # none was made twice


def test_the_end_of_a_process_is_the_end_of_its_run(content, tmp_path, capsys):
    folder = saved(content, tmp_path / "run" / "a.ckpt", 3).parent
    with subprocess.Popen(
        ["sleep", "1"]
    ) as process:  # nobody waits for it: a zombie is an end, too
        assert steps(follow(folder, "--pid", str(process.pid), "--idle", "0.01")) == [3]
    assert f"process {process.pid} has ended" in capsys.readouterr().err
    assert main(["measure", str(folder), "--follow", *NAMES, *FEW, "--pid", str(process.pid),
                 "--out", str(tmp_path / "out")]) == 2  # fmt: skip
    assert "there is no such process" in capsys.readouterr().err


def test_quiet_is_long_for_a_run_whose_checkpoints_are_far_apart(content, tmp_path, monkeypatch):
    folder = tmp_path / "logs" / "checkpoints"
    saved(content, folder / "a.ckpt", 0)
    saved(content, folder / "b.ckpt", 1000)  # seconds later
    metrics = tmp_path / "logs" / "metrics.csv"
    metrics.write_text("step,val_loss\n2,1\n")
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watch(folder)
    end = End(Run(folder, None), watch, idle=None, pid=None)

    def after(seconds: float) -> str | None:
        now[0] += seconds
        watch.look()
        end.look()
        return end.has_come()

    assert after(0) is None
    assert after(2990) is None  # far more than the 600 that are usual
    metrics.write_text("step,val_loss\n2,1\n5,1\n")  # the run lives
    assert after(20) is None
    assert after(2990) is None
    assert after(20) == "nothing has changed for 3010 s"


# Parts of several ranks ------------------------------------------------------------------------


def sharded(content: dict[str, Any], folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Writes what Lightning's model-parallel strategy writes; returns the weights."""
    file = saved(content, folder.with_suffix(".whole"), step)
    rest = torch.load(file, weights_only=True)
    state = rest.pop("state_dict")
    parts = {"state_dict": state, "optimizer_0": {"lr": 0.5, "momentum": torch.ones(3)}}
    dcp.save(parts, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    file.unlink()
    return state


def test_the_parts_of_ranks_are_measured_as_the_whole(content, tmp_path, capsys):
    whole = tmp_path / "whole" / "run"
    saved(content, whole / "a.ckpt", 3)
    expected = load_spectrum(follow(whole) / "spectra" / "a.npz").eigenvalues
    folder = tmp_path / "run"
    folder.mkdir()
    sharded(content, folder / "a.ckpt", 3)
    out = follow(folder)
    found = load_spectrum(out / "spectra" / "a.npz").eigenvalues
    np.testing.assert_array_equal(found, expected)
    # Afterwards, too: what is done is done, and what is not whole is named.
    shutil.copytree(folder / "a.ckpt", folder / "b.ckpt")
    next((folder / "b.ckpt").glob("*.distcp")).write_bytes(b"")
    arguments = ["measure", str(folder), *NAMES, *FEW[:4], "--out", str(out)]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "a.ckpt (1 of 2): measured before" in told
    assert "b.ckpt is damaged" in told


class Boom:
    """What a pickle of somebody's could do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("code", "names posix.mkdir, which torch does not write"),
        ("a file outside", "out of its folder"),
        ("too large", "claims more than its files hold"),
        ("a missing part", "0 of 9 values"),
    ],
)
def test_an_index_that_would_hurt_is_refused(case, words, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a.ckpt"
    sharded(content, folder, 3)
    index = pickle.loads((folder / ".metadata").read_bytes())
    name, where = next(
        (n, w) for n, w in index.storage_data.items() if n.fqn.startswith("state_dict.")
    )
    if case == "code":
        index.planner_data = Boom()
    elif case == "a file outside":
        shutil.copy(folder / where.relative_path, tmp_path / "elsewhere")
        where.relative_path = "../elsewhere"
    elif case == "too large":
        index.state_dict_metadata[name.fqn].size = torch.Size([2**40])
    else:
        del index.storage_data[name]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UnreadableFileError, match=words):
        copy_checkpoint(folder, tmp_path / "copy", trust=False)
    assert not Path("boom").exists()


def test_a_folder_that_is_written_again_is_waited_for(content, tmp_path):
    folder = tmp_path / "last.ckpt"
    sharded(content, folder, 3)
    assert looks_whole(version_of(folder))
    part = next(folder.glob("*.distcp"))
    later = (folder / "meta.pt").stat().st_mtime + 1
    os.utime(part, (later, later))  # a rank has begun to write the next one
    assert not looks_whole(version_of(folder))
    (folder / "meta.pt").unlink()
    assert not looks_whole(version_of(folder))


# Misuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["a.ckpt", "--follow"], "--follow takes a folder"),
        (["run", "run", "--follow"], "--follow takes one folder"),
        (["run", "--follow", "--again"], "Leave out --again"),
        (["run", "--follow", "--out", "run/spectra"], "Give one outside it"),
        (["run", "--follow", "--idle", "-1"], "--idle"),
        (["run", "--follow", "--run", "gone"], "no such folder"),
        (["run", "--follow", "--wandb-shared"], "Give --wandb, too"),
        (["run", "--follow", "--module", "support.trained:Nothing"], "has no 'Nothing'"),
        (["run", "--idle", "3"], "--idle belongs to --follow"),
        (["nothing", "--follow", "--idle", "0.2", "--interval", "0.05"], "no checkpoint was seen"),
        (["logs/checkpoints", "--follow", "--wandb"], "is no W&B run"),
        (["run", "--follow", "--out", "taken"], "Give another folder"),
    ],
)
def test_misuse_ends_in_one_line(more, words, content, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(content, Path("a.ckpt"), 3)
    saved(content, Path("run/a.ckpt"), 3)
    saved(content, Path("logs/checkpoints/a.ckpt"), 3)
    Path("taken").mkdir()
    Path("taken/sidecar.json").write_text('{"checkpoints": "/somewhere/else"}')
    Path("logs/metrics.csv").write_text("step,val_loss\n2,1\n")
    assert main(["measure", *NAMES, *more]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]


def test_the_step_is_that_of_the_row_of_the_loggers(content, tmp_path):
    """Three batches an epoch: Lightning's loggers have the validation of the first at step 2."""
    torch.save(content, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt", trust=False)
    assert (found.step, found.logged_step) == (3, 2)
    plain = {name: value for name, value in content.items() if name != "loops"}
    torch.save(plain, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt", trust=False).logged_step == 2

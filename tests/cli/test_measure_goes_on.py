"""`measure FOLDER` goes on past what cannot be read or measured, and names it at the end."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support import trained

from lightning_hessian.cli.main import main
from lightning_hessian.results import load_spectrum

NAMES = ["--module", "support.trained:Net", "--data", "support.trained:Data"]
FEW = ["--num-eigenvalues", "2", "--trace-probes", "0"]


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict[str, Any]:
    """What Lightning writes into a checkpoint."""
    folder = tmp_path_factory.mktemp("content")
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(trained.Net(width=3), datamodule=trained.Data())
    trainer.save_checkpoint(folder / "a.ckpt")
    return torch.load(folder / "a.ckpt", weights_only=True)


def saved(content: dict[str, Any], file: Path, **changed: Any) -> bytes:
    torch.save({**content, **changed}, file)
    return file.read_bytes()


def compressed(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


BYTES: dict[str, Callable[[Path, bytes], Any]] = {
    "half": lambda file, data: file.write_bytes(data[: len(data) // 2]),
    "junk": lambda file, data: file.write_bytes(b"junk"),
    "empty": lambda file, data: file.write_bytes(b""),
    "zeros": lambda file, data: file.write_bytes(bytes(len(data))),
    "a pickle": lambda file, data: file.write_bytes(b"\x80\x02}q\x00."),
    "a folder": lambda file, data: file.mkdir(),
    "a pipe": lambda file, data: os.mkfifo(file),
    "a link to nothing": lambda file, data: file.symlink_to("gone"),
    "a link to a device": lambda file, data: file.symlink_to("/dev/zero"),
    "compressed": compressed,
}
CONTENT: dict[str, dict[str, Any]] = {
    "step is text": {"global_step": "many"},
    "step is not a number": {"global_step": float("nan")},
    "step is infinite": {"global_step": float("inf")},
    "step is negative": {"global_step": -3},
    "step is huge": {"global_step": 10**40},
    "step is a list": {"global_step": [1]},
    "epoch is text": {"epoch": "two"},
    "hyperparameters in a list": {"hyper_parameters": [1, 2]},
    "hyperparameters of another kind": {"hyper_parameters": {"width": "wide"}},
    "a state in a list": {"state_dict": [1]},
    "a state of nothing": {"state_dict": {}},
    "a state of text": {"state_dict": {"head.weight": "text"}},
    "a state of another module": {"state_dict": {"other": torch.ones(3)}},
}


def goes_on(folder: Path, bad: str, capsys: Any, *more: str) -> str:
    """Measure a folder of one bad and two good checkpoints; returns what was said at the end."""
    code = main(["measure", str(folder), *NAMES, *FEW, "--out", str(folder / "out"), *more])
    said = capsys.readouterr().err
    assert code == 1
    assert "Traceback" not in said
    end = said.strip().splitlines()[-2]
    assert "1 of 3 could not be measured" in end
    assert bad in end
    with open(folder / "out" / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["6", "9"]
    assert len(list((folder / "out" / "spectra").glob("*.npz"))) == 2
    return end


def good(content: dict[str, Any], folder: Path) -> bytes:
    saved(content, folder / "b.ckpt", global_step=6)
    return saved(content, folder / "c.ckpt", global_step=9)


@pytest.mark.parametrize("case", BYTES)
def test_a_file_that_cannot_be_read_is_passed_over(case, content, tmp_path, capsys):
    data = good(content, tmp_path)
    BYTES[case](tmp_path / "a.ckpt", data)
    goes_on(tmp_path, "a.ckpt", capsys)


@pytest.mark.parametrize("case", CONTENT)
def test_a_checkpoint_of_another_kind_is_passed_over(case, content, tmp_path, capsys):
    good(content, tmp_path)
    saved(content, tmp_path / "a.ckpt", **CONTENT[case])
    goes_on(tmp_path, "a.ckpt", capsys)


@pytest.mark.parametrize(
    "states",
    [None, [1], "text", {"ModelCheckpoint": 3}, {3: {}}, {"ModelCheckpoint": {"monitor": ["a"]}},
     {"ModelCheckpoint": {"monitor": "val_loss", "current_score": "low"}},
     {"ModelCheckpoint": {"monitor": "step", "current_score": torch.ones(3)}},
     {"ModelCheckpoint": {"monitor": "step", "current_score": float("nan")}}],
    ids=str,
)  # fmt: skip
def test_states_of_callbacks_of_any_kind_do_not_matter(states, content, tmp_path):
    saved(content, tmp_path / "a.ckpt", callbacks=states, extra=nested(30))
    out = tmp_path / "out"
    assert main(["measure", str(tmp_path), *NAMES, *FEW, "--out", str(out)]) == 0
    with open(out / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3"]


def memory_ends(module: trained.Net, batch: Any) -> torch.Tensor:
    """The loss, for which memory does not suffice where the module was saved with that mark."""
    if float(module.head.bias.detach()[0]) == 7:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def allocation_fails(module: trained.Net, batch: Any) -> torch.Tensor:
    if float(module.head.bias.detach()[0]) == 7:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def raises(module: trained.Net, batch: Any) -> torch.Tensor:
    if float(module.head.bias.detach()[0]) == 7:
        raise KeyError("a key of the module's own")
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("loss", [memory_ends, allocation_fails, raises])
def test_what_fails_at_one_checkpoint_does_not_stop_the_others(loss, content, tmp_path, capsys):
    good(content, tmp_path)
    state = {**content["state_dict"], "head.bias": torch.full((2,), 7.0, dtype=torch.float64)}
    saved(content, tmp_path / "a.ckpt", state_dict=state)
    end = goes_on(tmp_path, "a.ckpt", capsys, "--loss", f"{__file__}:{loss.__name__}")
    assert "key of the module's own" in end if loss is raises else "--num-batches" in end


def no_batches() -> list[Any]:
    raise OSError("the disk is gone")


def broken_batches() -> list[Any]:
    raise KeyError("label")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data", f"{__file__}:no_batches"], "the disk is gone"),
        (["--data", f"{__file__}:broken_batches"], "'label'"),
        (["--device", "cuda:77"], "--device"),
        (["--device", "x"], "--device"),
        (["--module", "syntax.py:Net"], "cannot be imported"),
        (["--module", "dies.py:Net"], "ZeroDivisionError in dies.py, line 2"),
        (["--loss", "dies.py:loss"], "ZeroDivisionError"),
        (["--loss", "gone.py:loss"], "no file gone.py"),
    ],
)
def test_what_is_wrong_for_all_of_them_ends_with_a_remedy(
    change, words, content, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("syntax.py").write_text("def (:\n")
    Path("dies.py").write_text("#\n1 / 0\n")
    good(content, tmp_path)
    assert main(["measure", str(tmp_path), *NAMES, *FEW, "--out", "out", *change]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert not list(tmp_path.glob("out/spectra/*.npz"))


def test_a_damaged_file_of_ours_is_measured_again_and_a_foreign_one_named(
    content, tmp_path, capsys
):
    good(content, tmp_path)
    arguments = ["measure", str(tmp_path), *NAMES, *FEW, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    folder = tmp_path / "out" / "spectra"
    values = load_spectrum(folder / "b.npz").eigenvalues
    (folder / "b.npz").write_bytes((folder / "b.npz").read_bytes()[:300])
    (folder / "stranger.npz").write_bytes(b"no spectrum")
    capsys.readouterr()
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "b.npz is damaged" in said
    assert "stranger.npz" in said
    assert load_spectrum(folder / "b.npz").eigenvalues.tolist() == values.tolist()
    shutil.rmtree(folder)

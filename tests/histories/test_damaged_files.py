"""Every reader, given damaged real files and raw bytes: its own error, or left out by name.

`make test` tries a few cases for each reader and kind of damage, `make test-slow` thousands; the
table in docs/trust.md says how many. The cases are the same at every run.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import trained
from support.damage import KINDS, damaged, events, rezipped
from support.report_runs import logged, recording, write_csv_run
from support.wandb_files import framed
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_hessian import hessian_spectrum, load_runs
from lightning_hessian.cli.checkpoints import read_checkpoint
from lightning_hessian.cli.loading import module_of
from lightning_hessian.histories.cache import RunCache
from lightning_hessian.histories.hparams import read_hparams
from lightning_hessian.histories.local_runs import LocalRun, read_local_run
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.histories.transaction_log import TransactionLog
from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.results import (
    MeasurementError,
    UnreadableFileError,
    load_spectrum,
    save_spectrum,
)
from lightning_hessian.results.files import load_extra
from lightning_hessian.solvers.lanczos import lanczos
from lightning_hessian.tracking.loggers import write_text
from lightning_hessian.tracking.spectra import encode_spectrum

QUICK_CASES, SLOW_CASES = 2, 60
SECONDS = 10.0
"""Processor time that a damaged file of a few kilobytes may cost; a whole one takes 0.01 s."""

MEGABYTES = 400
"""Memory that all of the cases together may take beyond what the tests had before."""


@pytest.fixture(scope="module")
def real(own_wandb: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real files by the name of their reader, small, written by the writers themselves."""
    folder = tmp_path_factory.mktemp("real")
    spectrum = hessian_spectrum(
        trained.Net(), None, trained.batches(), num_eigenvalues=3, return_eigenvectors=True
    )
    with recording(folder, project="p", name="n", config={"lr": 0.1, "m": {"w": 8}}) as run:
        for row in logged(0, 6):
            code = encode_spectrum(spectrum.eigenvalues, spectrum.residuals)
            run.log(row | {"spectra/hessian": code, "nested": {"a": [1, 2]}})
    files = {"offline W&B": next(folder.glob("wandb/offline-run-*/*.wandb"))}
    csv = write_csv_run(folder / "logs", logged(1, 6), {"lr": 1, "betas": (0.9, 0.99), "s": [1]})
    files |= {"CSV": csv / "metrics.csv", "hparams.yaml": csv / "hparams.yaml"}
    for step in range(4):
        write_text(folder, "spectra/hessian", encode_spectrum(spectrum.eigenvalues), step)
    files["spectra, JSONL"] = folder / "spectra_hessian.jsonl"
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(folder / "tb"))
    for row in logged(2, 4):
        writer.add_scalar("val_loss", row["val_loss"], int(row["trainer/global_step"]))
    writer.close()
    files["TensorBoard"] = next((folder / "tb").glob("events*"))
    files["Lightning checkpoint"] = checkpoint(folder)
    extra = {
        "settings": {"seed": 0}, "source": {"path": "p", "bytes": 1, "modified": 2},
        "row": {"step": 3, "epoch": 1}, "hparams": {"lr": 0.1},
    }  # fmt: skip
    files["spectrum, NPZ"] = folder / "spectrum.npz"
    save_spectrum(spectrum, files["spectrum, NPZ"], extra)
    files["Lanczos checkpoint"] = folder / "run.lanczos"
    resumed(files["Lanczos checkpoint"], 12)
    (table,) = load_runs(csv, cache=folder / "cache").runs
    assert len(table) == 6
    (files["report cache"],) = (folder / "cache").glob("*.npz")
    return files


def checkpoint(folder: Path) -> Path:
    import lightning as L

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(trained.Net(width=2), datamodule=trained.Data())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def resumed(file: Path, bound: int) -> None:
    """A Lanczos run that goes on from a file, up to a bound on products."""
    matrix = torch.diag(torch.linspace(0.1, 1, 24, dtype=torch.float64) ** 2)
    lanczos(MatrixOperator(matrix), 3, tol=1e-12, max_basis=8, max_products=bound, checkpoint=file)


# How each file is read: returns, or raises what a caller of the reader knows ----------------------


def left_out(file: Path, name: str, folder: Path) -> None:
    """A run among good ones: the good ones are there, the bad one is, or is named."""
    good = folder / "good"
    if not good.exists():
        write_csv_run(good, logged(3, 5), {})
    bad = folder / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    bad.mkdir()
    shutil.copyfile(file, bad / name)
    table = load_runs(folder, cache=False, workers=1)
    assert len(table) + len(table.skipped) == 2
    assert any(run.source.startswith(str(good)) for run in table)
    assert len(table) == 2 or str(bad) in table.skipped[0]
    table.write_csv(folder / "table.csv")
    json.dumps([run.config for run in table])
    for text in (*table.problems, *(run.name for run in table)):
        text.encode()
        assert text.isprintable()


def message(work: Callable[[], Any]) -> str | None:
    """What an error says that a caller of a reader knows, None where there is none."""
    try:
        work()
    except (UnreadableFileError, MeasurementError, OSError) as error:
        return str(error)
    except ValueError as error:
        # The module does not fit, or the run is another one: both name the file.
        return (
            str(error) if "last.ckpt" in str(error) or "run.lanczos" in str(error) else fail(error)
        )
    return None


def fail(error: Exception) -> str:
    raise AssertionError(f"{type(error).__name__} is not the reader's own error") from error


def as_config(file: Path, name: str, folder: Path) -> None:
    problems: list[str] = []
    config = read_hparams(file, problems)
    assert problems or isinstance(config, dict)
    json.dumps(config).encode()


def as_checkpoint(file: Path, name: str, folder: Path) -> None:
    import argparse

    options = argparse.Namespace(module="Net", module_arg={})
    saved = read_checkpoint(file, trust=False)
    assert saved.step >= 0
    if said := message(lambda: module_of(trained.Net, saved, options)):
        assert str(file) in said


def as_spectrum(file: Path, name: str, folder: Path) -> None:
    for read in (load_extra, load_spectrum):
        read(file)


def as_lanczos(file: Path, name: str, folder: Path) -> None:
    # A digit damaged beneath its checksum may end as a MeasurementError instead.
    resumed(file, 14)


def as_cache(file: Path, name: str, folder: Path) -> None:
    cache = RunCache(folder)
    shutil.copyfile(file, cache._path(("key",)))
    found = cache.get(("key",))
    assert found is None or all(len(column) == len(found) for column in found.columns.values())


def as_spectra(file: Path, name: str, folder: Path) -> None:
    target = folder / "spectra_hessian.jsonl"
    shutil.copyfile(file, target)
    for _, spectrum in read_spectra(folder)["hessian"]:
        assert len(spectrum.eigenvalues) == len(spectrum.converged)


READERS: dict[str, tuple[str, Callable[[Path, str, Path], None]]] = {
    "offline W&B": ("run-bad.wandb", left_out),
    "offline W&B, checksums right": ("run-bad.wandb", left_out),
    "CSV": ("metrics.csv", left_out),
    "TensorBoard": ("events.out.tfevents.1.h", left_out),
    "TensorBoard, checksums right": ("events.out.tfevents.1.h", left_out),
    "hparams.yaml": ("hparams.yaml", as_config),
    "spectra, JSONL": ("spectra_hessian.jsonl", as_spectra),
    "spectrum, NPZ": ("spectrum.npz", as_spectrum),
    "spectrum, NPZ, checksums right": ("spectrum.npz", as_spectrum),
    "Lightning checkpoint": ("last.ckpt", as_checkpoint),
    "Lightning checkpoint, checksums right": ("last.ckpt", as_checkpoint),
    "Lanczos checkpoint": ("run.lanczos", as_lanczos),
    "Lanczos checkpoint, checksums right": ("run.lanczos", as_lanczos),
    "report cache": ("cache.npz", as_cache),
    "report cache, checksums right": ("cache.npz", as_cache),
}
_RIGHT = ", checksums right"


def records_of(file: Path) -> list[bytes]:
    with file.open("rb") as opened:
        opened.read(7)
        return [payload for _, payload in TransactionLog(opened)]


def event_records(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return found


def lanczos_file(data: bytes, change: Callable[[bytes], bytes], choose: int) -> bytes:
    """A Lanczos checkpoint whose header, a zip file behind mark and length, is changed."""
    length = int.from_bytes(data[8:16], "little")
    header = rezipped(data[16 : 16 + length], change, choose)
    return data[:8] + len(header).to_bytes(8, "little") + header + data[16 + length :]


def damaged_file(draw: Callable, reader: str, file: Path, kind: str) -> bytes:
    """The bytes of a damaged file; where checksums are to be right, damaged beneath them."""
    if not reader.endswith(_RIGHT):
        return draw(damaged(file.read_bytes(), kind))
    place = draw(st.integers(0, 40))
    if "W&B" in reader or "TensorBoard" in reader:
        found = records_of(file) if "W&B" in reader else event_records(file.read_bytes())
        place %= len(found)
        found[place] = draw(damaged(found[place], kind))
        return framed(found) if "W&B" in reader else events(found, masked_crc32c)
    if "Lanczos" in reader:
        return lanczos_file(file.read_bytes(), lambda content: draw(damaged(content, kind)), place)
    return rezipped(file.read_bytes(), lambda content: draw(damaged(content, kind)), place)


def hold(reader: str, kind: str, real: dict[str, Path], folder: Path, cases: int) -> None:
    """Try so many cases."""
    name, read = READERS[reader]
    file = real[reader.removesuffix(_RIGHT)]

    @settings(
        max_examples=cases, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        copy = folder / name
        copy.write_bytes(damaged_file(data.draw, reader, file, kind))
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = message(lambda: read(copy, name, folder / "read"))
            assert said is None or said.strip()
        assert time.process_time() - begun < SECONDS

    (folder / "read").mkdir()
    one()


@pytest.fixture(scope="module")
def memory(real: dict[str, Path]) -> Any:
    def used() -> float:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 if sys.platform == "linux" else 2**20)

    before = used()
    yield
    assert used() - before < MEGABYTES


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_left_out_by_name(reader, kind, real, tmp_path):
    hold(reader, kind, real, tmp_path, QUICK_CASES)


@pytest.mark.slow
@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_thousands_of_damaged_files_are_left_out_by_name(reader, kind, real, tmp_path):
    hold(reader, kind, real, tmp_path, SLOW_CASES)


@pytest.mark.parametrize("reader", [name for name in READERS if not name.endswith(_RIGHT)])
def test_the_real_files_are_read(reader, real, tmp_path):
    """What the cases above start from is whole: nothing of it is left out."""
    name, read = READERS[reader]
    file = tmp_path / name
    shutil.copyfile(real[reader], file)
    (tmp_path / "read").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read(file, name, tmp_path / "read")
    if read is left_out:
        kind = {"offline W&B": "offline", "CSV": "csv"}.get(reader, "tensorboard")
        run = read_local_run(LocalRun(kind, tmp_path, (file,)))
        assert run.problems == ()
        assert np.isfinite(run.series("val_loss")).all()
    if reader == "offline W&B":
        assert len(read_offline_run(file).rows) == 6
        assert len(read_spectra(file)["hessian"]) == 6


def table_text() -> str:
    """The table of docs/trust.md: cases held by `make test-slow` for each reader and damage."""
    lines = [f"| reader | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    lines += [f"| {reader} | {' | '.join([str(SLOW_CASES)] * len(KINDS))} |" for reader in READERS]
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_is_tried():
    page = Path(__file__).parents[2] / "docs" / "trust.md"
    assert table_text() in page.read_text(encoding="utf-8")

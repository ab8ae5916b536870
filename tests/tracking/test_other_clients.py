"""SwanLab and Aim with their real clients, offline. Not among the test packages."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from support.runs import measuring, train
from tracking.test_every_logger import (
    MEASUREMENTS,
    assert_picture,
    assert_scalars,
    assert_spectra,
    names_at,
    scalars_by_step,
)

from lightning_hessian.tracking.spectra import decode_spectrum

FIGURES = {f"figures/{name}" for name in names_at(MEASUREMENTS)}


def test_swanlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab", reason="SwanLab is not installed")
    from swanlab.integration.pytorch_lightning import SwanLabLogger
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    monkeypatch.chdir(tmp_path)
    callback = measuring()
    logger = SwanLabLogger(project="test", mode="offline", log_dir=str(tmp_path / "runs"))
    train(tmp_path, [callback], logger)
    logger.experiment.finish()
    (file,) = (tmp_path / "runs").glob("*/*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    scalars: dict[str, list[tuple[int, float]]] = defaultdict(list)
    media: dict[str, dict[int, Any]] = defaultdict(dict)
    for payload in reader:
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "scalar" and record.scalar.key != "epoch":
            scalars[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
        elif kind == "media":
            media[record.media.key][record.media.step] = record.media.value.items[0]
    reader.close()
    assert_scalars(scalars_by_step(scalars), callback)
    texts = {
        step: (file.parent / "media" / "text" / item.filename).read_text()
        for step, item in media.pop("spectra/hessian").items()
    }
    assert_spectra([(step, decode_spectrum(text)) for step, text in texts.items()], callback)
    assert set(media) - {"identity/hessian"} == FIGURES
    assert list(media["figures/hessian_rank"]) == [1, 5, 9, 12]
    for key in FIGURES:
        last = media[key][12]
        assert last.caption == "step 12"
        assert_picture((file.parent / "media" / "image" / last.filename).read_bytes())


class ReadsAim(L.Callback):
    """Reads a run while it is open: Aim 3.29 gave nothing back of one that was closed."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.metrics: dict[str, list[tuple[int, float]]] = {}
        self.pictures: dict[str, dict[int, Any]] = {}
        self.spectra: list[tuple[int, Any]] = []

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        from aim.storage.context import Context

        run = self.logger.experiment
        for metric in run.metrics():
            subset = metric.context.to_dict().get("subset")
            name = f"{subset}_{metric.name}" if subset else metric.name
            table = metric.dataframe().sort_values("step")
            self.metrics[name] = list(zip(table["step"], table["value"], strict=True))
        context = Context({})
        for name in FIGURES:
            steps, images = run.get_image_sequence(name, context).values.sparse_list()
            self.pictures[name] = dict(zip(steps, images, strict=True))
        steps, texts = run.get_text_sequence("spectra/hessian", context).values.sparse_list()
        self.spectra = [
            (step, decode_spectrum(text.data)) for step, text in zip(steps, texts, strict=True)
        ]


def test_aim(tmp_path: Path) -> None:
    pytest.importorskip("aim", reason="Aim is not installed")
    from aim.pytorch_lightning import AimLogger

    logger = AimLogger(
        repo=str(tmp_path), system_tracking_interval=None, log_system_params=False,
        capture_terminal_logs=False,
    )  # fmt: skip
    callback, reading = measuring(), ReadsAim(logger)
    train(tmp_path, [callback, reading], logger)
    found = {k: v for k, v in reading.metrics.items() if k != "epoch"}
    assert_scalars(scalars_by_step(found), callback)
    assert_spectra(reading.spectra, callback)
    assert set(reading.pictures) == FIGURES
    assert list(reading.pictures["figures/hessian_rank"]) == [1, 5, 9, 12]
    assert {images[12].caption for images in reading.pictures.values()} == {"step 12"}

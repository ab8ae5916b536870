"""Three epochs with each logger: what each of them holds afterwards, value by value."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.runs import (
    csv_rows,
    finished,
    measuring,
    measuring_rank_only,
    tensorboard_events,
    train,
    wandb_logger,
)

from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.tracking.spectra import decode_spectrum

ALWAYS = {"rank", "cutoff", "eigengaps", "density", "blocks", "heterogeneity"}
LATER = {"emergence", "stability", "scatter_val_loss", "scatter_gap"}  # from two on, and four
MEASUREMENTS = 6
STEPS = [2 * i + 1 for i in range(MEASUREMENTS)]  # of the rows: Lightning counts from 0
DRAWN = [1, 3, 5, 6]  # every second measurement from the first on, and the last


def scalars_by_step(found: dict[str, list[tuple[int, float]]]) -> dict[int, dict[str, float]]:
    """Turns key -> [(step, value)] into step -> key -> value, and checks the steps."""
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for key, points in found.items():
        steps = [step for step, _ in points]
        assert steps == sorted(steps), f"{key} goes back in its steps"
        assert len(steps) == len(set(steps)), f"{key} has a step twice"
        for step, value in points:
            rows[step][key] = value
    return rows


def assert_scalars(rows: dict[int, dict[str, float]], callback: Any) -> None:
    """Every statistic of every measurement is there, and every correlation of the history."""
    for step, expected in zip(STEPS, callback.history, strict=True):
        for name, value in expected.items():
            if name in ("step", "epoch"):
                continue
            key = name if name == "val_loss" or "/" in name else f"hessian/{name}"
            assert np.float32(rows[step][key]) == np.float32(value), key
    with_correlations = [s for s in STEPS if "correlation/num_points" in rows.get(s, {})]
    assert with_correlations == STEPS[3:]
    last = rows[STEPS[-1]]
    for (statistic, monitor), found in callback.correlations().items():
        pair = f"{statistic}_{monitor}".replace("/", "_")
        expected = {
            f"pearson_{pair}": found.r,
            f"pearson_low_{pair}": found.interval[0],
            f"pearson_high_{pair}": found.interval[1],
            f"spearman_{pair}": found.spearman,
            f"differences_{pair}": found.r_differences,
        }
        for name, value in expected.items():
            assert last[f"correlation/{name}"] == pytest.approx(value, rel=1e-6)
        of_all = last["correlation/num_points"]
        assert last.get(f"correlation/num_points_{pair}", of_all) == found.num_points


def assert_spectra(found: list[tuple[int, Any]], callback: Any) -> None:
    assert [step for step, _ in found] == STEPS
    spectrum = callback.last_spectrum
    _, last = found[-1]
    np.testing.assert_array_equal(last.eigenvalues, spectrum.eigenvalues.astype(np.float32))
    np.testing.assert_array_equal(last.residuals, spectrum.residuals.astype(np.float32))
    np.testing.assert_array_equal(last.converged, spectrum.converged)


def assert_picture(png: bytes) -> None:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert min(image.size) > 300
    assert len(image.getcolors(100_000)) > 10, "the picture is empty"


def names_at(measurement: int) -> set[str]:
    names = ALWAYS | LATER
    if measurement < 4:
        names = names - {"scatter_val_loss", "scatter_gap"}
    if measurement == 1:
        names = names - {"emergence", "stability"}
    return {f"hessian_{name}" for name in names}


def assert_files(folder: Path) -> None:
    """The pictures of each drawn measurement."""
    found = {path.name for path in (folder / "figures").iterdir()}
    expected = {f"{name}_step_{2 * i - 1:08}.png" for i in DRAWN for name in names_at(i)}
    assert found == expected
    for path in (folder / "figures").glob("*.png"):
        assert_picture(path.read_bytes())


# W&B ------------------------------------------------------------------------------------------


def assert_wandb(run: Any, folder: Path, callback: Any) -> None:
    found = defaultdict(list)
    pictures = defaultdict(list)
    for row in run.rows:
        step = row["trainer/global_step"]
        for key, value in row.items():
            if key.startswith(("hessian/", "correlation/", "stability/")) or key == "val_loss":
                found[key].append((step, value))
            if key.startswith("figures/") and key.endswith(".path"):
                pictures[step].append((key.removesuffix(".path"), value))
    assert_scalars(scalars_by_step(found), callback)
    assert_spectra(read_spectra(folder)["hessian"], callback)
    steps = [row["trainer/global_step"] for row in run.rows if "trainer/global_step" in row]
    assert steps == sorted(steps)
    assert list(pictures) == [2 * i - 1 for i in DRAWN]
    (files,) = folder.glob("wandb/offline-run-*/files")
    for measurement, shown in zip(DRAWN, pictures.values(), strict=True):
        assert {key for key, _ in shown} == {f"figures/{n}" for n in names_at(measurement)}
        for _, path in shown:
            assert_picture((files / path).read_bytes())


@pytest.mark.usefixtures("own_wandb")
def test_wandb(tmp_path: Path) -> None:
    callback, logger = measuring(), wandb_logger(tmp_path)
    train(tmp_path, [callback], logger)
    run = finished(logger, tmp_path)
    assert_wandb(run, tmp_path, callback)
    assert not (tmp_path / "hessian_logs").exists(), "W&B takes all there is"
    # The summary holds last values as plain numbers, by which W&B sorts and scatters runs.
    last = callback.history[-1]
    assert run.summary["hessian/d_ks"] == pytest.approx(last["d_ks"], rel=1e-6)
    assert "spectra/hessian" not in run.summary
    assert all(re.fullmatch(r"\w+/\w+", key) for row in run.rows for key in row
               if key.startswith(("hessian", "correlation", "spectra")))  # fmt: skip


@pytest.mark.usefixtures("own_wandb")
def test_every_key_is_defined_by_its_name_on_the_right_step(tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    from lightning_hessian.histories.transaction_log import TransactionLog

    callback, logger = measuring(), wandb_logger(tmp_path, prefix="mine")
    train(tmp_path, [callback], logger)
    run = finished(logger, tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    defined = {}
    with file.open("rb") as opened:
        for _, payload in TransactionLog(opened):
            record = Record.FromString(payload)
            if record.WhichOneof("record_type") == "metric" and record.metric.name:
                defined[record.metric.name] = record.metric
    ours = {key for row in run.rows for key in row if key.startswith("mine-")}
    ours = {re.sub(r"\.\w+$", "", key) for key in ours if not key.startswith("mine-figures/")}
    ours -= {"mine-train_loss", "mine-val_loss", "mine-epoch"}  # Lightning's
    assert len(ours) > 50
    assert ours <= defined.keys()
    assert {defined[key].step_metric for key in ours} == {"trainer/global_step"}
    assert not any("*" in name for name in defined)


@pytest.mark.usefixtures("own_wandb")
def test_wandb_draws_a_rank_plot_itself(tmp_path: Path) -> None:
    import powerlaw
    from wandb.proto.wandb_internal_pb2 import Record

    from lightning_hessian.histories.transaction_log import TransactionLog

    callback, logger = measuring_rank_only(figures=2, num_eigenvalues=24), wandb_logger(tmp_path)
    train(tmp_path, [callback], logger)
    run = finished(logger, tmp_path)
    key = "charts/hessian_rank"
    logged = [row for row in run.rows if f"{key}_table.path" in row]
    pictures = [row for row in run.rows if "figures/hessian_rank.path" in row]
    steps = [[row["trainer/global_step"] for row in rows] for rows in (logged, pictures)]
    assert steps[0] == steps[1] == [1, 5, 9, 11]
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    table = json.loads((files / logged[-1][f"{key}_table.path"]).read_text())
    assert table["columns"] == ["x", "line", "y"]
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for x, name, y in table["data"]:
        lines[name].append((x, y))
    assert list(lines) == ["step 11", "fitted power law"]
    leading = callback.last_spectrum.leading
    expected = np.log10([np.arange(1, len(leading) + 1), leading]).T
    np.testing.assert_allclose(lines["step 11"], expected, atol=1e-6)
    fit = powerlaw.Fit(leading, xmin=leading.min(), verbose=0)
    (x0, y0), (x1, y1) = lines["fitted power law"]
    assert (x0, x1) == (0, pytest.approx(np.log10(len(leading))))
    assert y1 == pytest.approx(np.log10(leading.min()), abs=1e-6)
    assert (y0 - y1) / (x1 - x0) == pytest.approx(1 / (fit.power_law.alpha - 1), rel=1e-4)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    shown = []
    with file.open("rb") as opened:
        for _, payload in TransactionLog(opened):
            for item in Record.FromString(payload).config.update:
                if tuple(item.nested_key) == ("_wandb", "visualize", key):
                    shown.append(json.loads(item.value_json)["panel_config"])
    assert shown[-1]["panelDefId"] == "wandb/lineseries/v0"
    assert shown[-1]["fieldSettings"] == {"step": "x", "lineKey": "line", "lineVal": "y"}


# The others -----------------------------------------------------------------------------------


def tensorboard_holds(logger: Any, callback: Any) -> None:
    events = tensorboard_events(logger.log_dir)
    tags = events.Tags()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in tags["scalars"]
        if tag != "epoch"
    }
    assert_scalars(scalars_by_step(found), callback)
    spectra = [
        (e.step, decode_spectrum(e.tensor_proto.string_val[0].decode()))
        for e in events.Tensors("spectra/hessian/text_summary")
    ]
    assert_spectra(spectra, callback)
    assert set(tags["images"]) == {f"figures/{name}" for name in names_at(6)}
    images = events.Images("figures/hessian_rank")
    assert [image.step for image in images] == [1, 5, 9, 11]
    for image in images:
        assert_picture(image.encoded_image_string)


def test_tensorboard(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    callback, logger = measuring(), TensorBoardLogger(tmp_path)
    train(tmp_path, [callback], logger)
    logger.experiment.flush()
    tensorboard_holds(logger, callback)
    assert not (tmp_path / "hessian_logs").exists()


def csv_holds(logger: Any, callback: Any) -> None:
    found = defaultdict(list)
    for row in csv_rows(logger):
        for key in row.keys() - {"step", "epoch"}:
            found[key].append((int(row["step"]), row[key]))
    assert_scalars(scalars_by_step(found), callback)
    assert_spectra(read_spectra(logger.log_dir)["hessian"], callback)
    assert_files(Path(logger.log_dir))


def test_csv_gets_figures_and_spectra_as_files(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    callback, logger = measuring(), CSVLogger(tmp_path)
    train(tmp_path, [callback], logger)
    csv_holds(logger, callback)
    assert not (tmp_path / "hessian_logs").exists()


def test_mlflow_with_a_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # frozen by mlflow 3, still there
    callback = measuring()
    logger = MLFlowLogger(experiment_name="test", save_dir=str(tmp_path / "mlruns"))
    train(tmp_path, [callback], logger)
    (store,) = (tmp_path / "mlruns").glob(f"*/{logger.run_id}")
    found = {}
    for path in (store / "metrics").rglob("*"):  # as the store lies on the disk
        if path.is_file():
            lines = [line.split() for line in path.read_text().splitlines()]
            found[str(path.relative_to(store / "metrics"))] = [
                (int(step), float(value)) for _, value, step in lines
            ]
    found.pop("epoch")
    assert_scalars(scalars_by_step(found), callback)
    texts = sorted((store / "artifacts" / "spectra").iterdir())
    codes = [(int(re.findall(r"\d+", p.name)[-1]), p.read_text()) for p in texts]
    assert_spectra([(step, decode_spectrum(code)) for step, code in codes], callback)
    shown = {path.name for path in (store / "artifacts" / "figures").iterdir()}
    assert shown == {f"{n}_step_{2 * i - 1:08}.png" for i in DRAWN for n in names_at(i)}
    for path in (store / "artifacts" / "figures").iterdir():
        assert_picture(path.read_bytes())


@pytest.mark.usefixtures("own_wandb")
def test_two_loggers_at_once(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    callback = measuring()
    loggers = [wandb_logger(tmp_path), CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tb")]
    train(tmp_path, [callback], loggers)
    loggers[2].experiment.flush()
    assert_wandb(finished(loggers[0], tmp_path), tmp_path, callback)
    csv_holds(loggers[1], callback)
    tensorboard_holds(loggers[2], callback)


def test_no_logger(tmp_path: Path) -> None:
    callback = measuring()
    trainer = train(tmp_path, [callback], False)
    assert len(callback.history) == MEASUREMENTS
    assert float(trainer.callback_metrics["hessian/d_ks"]) > 0
    folder = tmp_path / "hessian_logs" / "version_0"
    assert_files(folder)
    assert_spectra(read_spectra(folder)["hessian"], callback)
    again = measuring()
    train(tmp_path, [again], False)
    assert (tmp_path / "hessian_logs" / "version_1").is_dir(), "runs do not mix"
    lines = (folder / "spectra_hessian.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == STEPS


def test_comet_offline(tmp_path: Path) -> None:
    """Not among the test packages: runs where comet_ml is installed."""
    pytest.importorskip("comet_ml")
    import zipfile

    import comet_ml
    from lightning.pytorch.loggers import CometLogger

    callback = measuring()
    logger = CometLogger(online=False)  # which turns logging off, so give it one that is on
    logger._experiment = comet_ml.OfflineExperiment(
        offline_directory=str(tmp_path), project_name="test", log_code=False, log_graph=False,
        auto_metric_logging=False, display_summary_level=0,
    )  # fmt: skip
    train(tmp_path, [callback], logger)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    texts, shown = {}, defaultdict(set)
    with zipfile.ZipFile(archive) as opened:
        for message in map(json.loads, opened.read("messages.json").decode().splitlines()):
            payload = message["payload"]
            if message["type"] == "metric_msg":
                found = payload["metric"]
                point = (found["step"], float(found["metricValue"]))
                metrics[found["metricName"]].append(point)
            elif message["type"] == "file_upload":
                about, content = payload["additional_params"], opened.read(payload["file_path"])
                if payload["upload_type"] == "visualization":
                    shown[about["step"]].add(about["figName"])
                    assert_picture(content)
                elif payload["metadata"] == {"key": "spectra/hessian"}:
                    texts[about["step"]] = decode_spectrum(content.decode())
    assert_scalars(scalars_by_step(metrics), callback)
    assert_spectra(sorted(texts.items()), callback)
    assert list(shown) == [1, 5, 9, 11]
    assert shown[11] == {f"figures/{name}" for name in names_at(6)}


def test_a_run_that_logs_nothing_writes_nothing(tmp_path: Path) -> None:
    train(tmp_path, [measuring(figures=None)], False)
    assert not list(tmp_path.rglob("metrics.csv"))
    train(tmp_path, [measuring()], True, epochs=1, fast_dev_run=True, val_check_interval=None)
    assert not list(tmp_path.rglob("*.png"))
    assert not list(tmp_path.rglob("*.jsonl"))

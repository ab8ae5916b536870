"""Which logger takes what: one row for each, found by the name of its class.

Scalars go to every logger through Lightning. Beyond them a logger may want each key defined, and
may take figures and texts; what it does not take is written to files in its folder. Names, not
classes, are looked up (along the class's ancestors), so that the loggers of ``lightning`` and of
``pytorch_lightning`` are served alike and none has to be installed.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning_hessian.tracking.charts import Chart

STEP = "trainer/global_step"
"""The step metric that `WandbLogger` writes into each of its rows."""


@dataclass(frozen=True)
class Picture:
    """A figure on its way to a logger.

    Attributes:
        key: ``figures/<name>``.
        png: The file's bytes.
        step: Of the measurement that it shows.
    """

    key: str
    png: bytes
    step: int


@dataclass(frozen=True)
class Adapter:
    """What one kind of logger can do beyond scalars; None where files serve instead.

    Attributes:
        define: ``define(logger, keys)``, called before a key is first logged.
        pictures: ``pictures(logger, pictures, step)``.
        text: ``text(logger, key, value, step)``.
        chart: ``chart(logger, chart, step)``, of one that the dashboard draws; nothing stands in.
        folder: ``folder(logger)``, where its run keeps files; None if it is not known.
        takes_files: Whether files stand in for what is None above.
        hyperparameters: ``hyperparameters(logger, values)``, called before Lightning logs those of
            the module.
        readable_texts: Whether a report can read the texts back; else a file in ``folder`` holds
            what it has to know.
    """

    define: Callable[[Any, Iterable[str]], None] | None = None
    pictures: Callable[[Any, list[Picture], int], None] | None = None
    text: Callable[[Any, str, str, int], None] | None = None
    chart: Callable[[Any, Chart, int], None] | None = None
    folder: Callable[[Any], str | Path | None] = lambda logger: (
        getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    )
    takes_files: bool = True
    readable_texts: bool = True
    hyperparameters: Callable[[Any, dict[str, Any]], None] = lambda logger, values: (
        logger.log_hyperparams(values)
    )


def adapter(logger: Any) -> Adapter:
    """Return the row of the table for a logger, that of its nearest ancestor; else that of files.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> adapter(CSVLogger(".")).pictures is None
        True
    """
    names = [kind.__name__ for kind in type(logger).__mro__]
    return next((ADAPTERS[name] for name in names if name in ADAPTERS), Adapter())


def write_picture(folder: Path, picture: Picture) -> None:
    """Write a picture into ``<folder>/figures``: a PNG for each step."""
    name = picture.key.partition("/")[2]
    target = folder / "figures" / f"{name}_step_{picture.step:08}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(picture.png)


def write_text(folder: Path, key: str, value: str, step: int) -> None:
    """Append a line of JSON to ``<folder>/<key>.jsonl``, the slash of the key an underscore."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key.replace('/', '_')}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, key: value}) + "\n")


_OWN_FOLDERS: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def own_folder(trainer: Any) -> Path:
    """Return where the files of a run go that no logger has a folder for.

    It is ``hessian_logs/version_<n>`` in the Trainer's ``default_root_dir``, with the first free
    number; the same one for all callbacks of a Trainer. Nothing is made here.
    """
    if trainer not in _OWN_FOLDERS:
        parent = Path(trainer.default_root_dir) / "hessian_logs"
        taken = {path.name for path in parent.glob("version_*")}
        number = next(n for n in count() if f"version_{n}" not in taken)
        _OWN_FOLDERS[trainer] = parent / f"version_{number}"
    return _OWN_FOLDERS[trainer]


# W&B ------------------------------------------------------------------------------------------


def _prefixed(logger: Any, key: str) -> str:
    """Return a key as Lightning's loggers write it where the user gave them a prefix."""
    prefix = getattr(logger, "_prefix", "") or ""
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{key}" if prefix else key


def _wandb_define(logger: Any, keys: Iterable[str]) -> None:
    # By its exact name: a pattern changes what W&B keeps of other keys it happens to match. No
    # summary is asked for: then the last value stands in it as a plain number, by which runs can
    # be sorted; "last" asked for by name would make it {"last": value}.
    for key in keys:
        summary = {"summary": "none"} if key.startswith("spectra/") else {}
        logger.experiment.define_metric(_prefixed(logger, key), step_metric=STEP, **summary)


def _wandb_pictures(logger: Any, pictures: list[Picture], step: int) -> None:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        row = {}
        for i, picture in enumerate(pictures):
            path = Path(folder) / f"{i}.png"
            path.write_bytes(picture.png)
            image = wandb.Image(str(path), caption=f"step {picture.step}")
            row[_prefixed(logger, picture.key)] = image
        logger.experiment.log({**row, STEP: step})  # copies the files


def _wandb_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.experiment.log({_prefixed(logger, key): value, STEP: step})


def _wandb_chart(logger: Any, chart: Chart, step: int) -> None:
    import wandb

    columns = ["x", "line", "y"]
    rows = [[float(x), name, float(y)] for name, points in chart.lines.items() for x, y in points]
    # A preset of W&B's: a Vega spec of our own would have to be saved on the server first.
    plot = wandb.plot_table(
        "wandb/lineseries/v0",
        wandb.Table(columns=columns, data=rows),
        fields={"step": "x", "lineKey": "line", "lineVal": "y"},
        string_fields={"title": chart.title, "xname": chart.x},
    )
    logger.experiment.log({_prefixed(logger, chart.key): plot, STEP: step})


# TensorBoard ----------------------------------------------------------------------------------


def _tensorboard_pictures(logger: Any, pictures: list[Picture], step: int) -> None:
    import numpy as np
    from PIL import Image

    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
        logger.experiment.add_image(picture.key, pixels, step, dataformats="HWC")


def _tensorboard_hyperparameters(logger: Any, values: dict[str, Any]) -> None:
    # TensorBoard shows the hyperparameters that were logged first, and nothing of later ones. Those
    # are the module's. Ours go to hparams.yaml, which the logger writes of all that it knows.
    logger.hparams.update(values)


def _tensorboard_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.experiment.add_text(key, value, step)


# MLflow ---------------------------------------------------------------------------------------


def _mlflow_pictures(logger: Any, pictures: list[Picture], step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for picture in pictures:
            write_picture(Path(folder), picture)
        logger.experiment.log_artifacts(logger.run_id, folder)


def _mlflow_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, value, f"{key}_step_{step:08}.txt")


# Comet ----------------------------------------------------------------------------------------


def _comet_pictures(logger: Any, pictures: list[Picture], step: int) -> None:
    for picture in pictures:
        logger.experiment.log_image(io.BytesIO(picture.png), name=picture.key, step=step)


def _comet_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.experiment.log_text(value, step=step, metadata={"key": key})


# Trackio, SwanLab -----------------------------------------------------------------------------


def _images_at_step(logger: Any, pictures: list[Picture], step: int) -> None:
    from PIL import Image

    for picture in pictures:
        image = Image.open(io.BytesIO(picture.png)).convert("RGB")
        logger.log_image(picture.key, [image], step, caption=[f"step {picture.step}"])


def _trackio_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.log_text(key, value, step)


def _swanlab_text(logger: Any, key: str, value: str, step: int) -> None:
    logger.log_text(key, [value], step)


# Aim ------------------------------------------------------------------------------------------


def _aim_pictures(logger: Any, pictures: list[Picture], step: int) -> None:
    from aim import Image
    from PIL import Image as Pillow

    for picture in pictures:
        image = Pillow.open(io.BytesIO(picture.png)).convert("RGB")
        shown = Image(image, caption=f"step {picture.step}")
        logger.experiment.track(shown, name=picture.key, step=step)


def _aim_text(logger: Any, key: str, value: str, step: int) -> None:
    from aim import Text

    logger.experiment.track(Text(value), name=key, step=step)


ADAPTERS: Mapping[str, Adapter] = {
    "WandbLogger": Adapter(_wandb_define, _wandb_pictures, _wandb_text, _wandb_chart),
    "TensorBoardLogger": Adapter(
        pictures=_tensorboard_pictures,
        text=_tensorboard_text,
        readable_texts=False,
        hyperparameters=_tensorboard_hyperparameters,
    ),
    "MLFlowLogger": Adapter(pictures=_mlflow_pictures, text=_mlflow_text),
    "CometLogger": Adapter(pictures=_comet_pictures, text=_comet_text),
    "TrackioLogger": Adapter(pictures=_images_at_step, text=_trackio_text),
    "SwanLabLogger": Adapter(pictures=_images_at_step, text=_swanlab_text),
    "AimLogger": Adapter(pictures=_aim_pictures, text=_aim_text),
    "CSVLogger": Adapter(folder=lambda logger: logger.log_dir),
    "DummyLogger": Adapter(takes_files=False),  # that of fast_dev_run
}

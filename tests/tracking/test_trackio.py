"""`TrackioLogger` with the real client, offline: what its store holds afterwards, value by value.

Not among the test packages: runs where trackio is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from callbacks.tiny_modules import Regression, val_loader
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
from lightning_hessian.tracking.trackio_logger import TrackioLogger


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackio's folder; it is looked up where Trackio is imported first, which is here."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio", reason="Trackio is not installed")
        yield folder


def rows_of(project: str, name: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(project, name)


def test_it_holds_what_was_logged(store: Path, tmp_path: Path) -> None:
    callback = measuring()
    logger = TrackioLogger("test", name="one", auto_log_cpu=False)
    train(tmp_path, [callback], logger)
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    texts, pictures = {}, defaultdict(dict)
    for row in rows_of("test", "one"):
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                found[key].append((row["step"], value))
            if key == "spectra/hessian":
                texts[row["step"]] = decode_spectrum(value)
            if key.startswith("figures/"):
                pictures[row["step"]][key] = value
    assert_scalars(scalars_by_step(found), callback)
    assert_spectra(sorted(texts.items()), callback)
    assert list(pictures) == [1, 5, 9, 12]
    assert set(pictures[12]) == {f"figures/{name}" for name in names_at(MEASUREMENTS)}
    for picture in pictures[12].values():
        assert picture["caption"] == "step 12"
        assert_picture((store / "media" / picture["file_path"]).read_bytes())
    assert not (tmp_path / "hessian_logs").exists()


def test_hyperparameters_a_prefix_and_more_after_the_end(store: Path, tmp_path: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    logger = TrackioLogger("more", prefix="mine", config={"seed": 3}, auto_log_cpu=False)
    logger.log_hyperparams({"lr": 0.1, "_spec": {"widths": (1, 2)}, "net": Regression})
    assert logger.version is None
    trainer = train(tmp_path, [], logger, epochs=1)
    name = logger.version
    assert name
    before = len(rows_of("more", name))
    assert before > 0
    trainer.test(Evaluated(), val_loader(), verbose=False)
    rows = rows_of("more", name)
    assert len(rows) == before + 1, "the run was taken up again"
    assert rows[-1]["mine-test_loss"] == pytest.approx(float(trainer.callback_metrics["test_loss"]))
    config = SQLiteStorage.get_run_config("more", name)
    assert (config["lr"], config["seed"], config["spec"]) == (0.1, 3, {"widths": [1, 2]})
    assert "Regression" in config["net"]
    assert logger.name == "more"


class Evaluated(Regression):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("test_loss", ((self.net(inputs) - targets) ** 2).mean())


@pytest.mark.usefixtures("store")
def test_two_ranks_write_one_run(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import lightning as L
from callbacks.tiny_modules import Regression, train_loader, val_loader
from lightning_hessian.tracking.trackio_logger import TrackioLogger
L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, log_every_n_steps=1,
          enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
          logger=TrackioLogger("ranks", auto_log_cpu=False), default_root_dir={str(tmp_path)!r},
          ).fit(Regression(), train_loader(), val_loader())
"""
    job = tmp_path / "job.py"
    job.write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "own"), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(job)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [sys.executable, "-c", "import trackio; print(len(trackio.Api().runs('ranks')))"],
        capture_output=True, text=True, timeout=100, env=environment,
    )  # fmt: skip
    assert listed.stdout.split()[-1] == "1", listed.stderr


def test_without_trackio_it_says_what_to_install() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "trackio":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from lightning_hessian.tracking.trackio_logger import TrackioLogger
try:
    TrackioLogger("digits")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "pip install 'lightning-hessian[trackio]'" in done.stdout, done.stderr

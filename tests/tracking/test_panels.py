"""Figures at their cadence, at no cost to the run: not its weights, not its life, not its clock."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from support.runs import measuring, measuring_rank_only, train

from lightning_hessian import GradientStructureCallback
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.measure.budget import Budget
from lightning_hessian.tracking import panels as panels_module
from lightning_hessian.tracking.loggers import ADAPTERS, adapter


def drawn_at(folder: str | Path) -> list[int]:
    """Returns after how many steps a figure was drawn; its file counts them from 0."""
    found = Path(folder).glob("figures/hessian_rank_step_*.png")
    return sorted(int(path.stem.rpartition("_")[2]) + 1 for path in found)


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(1, 2, [2, 4, 6, 8]), (3, 4, [2, 8, 14, 16]), (100, 2, [2, 8]), (3, 2, [2, 8])],
)
def test_figures_come_at_the_cadence(
    every: int, epochs: int, expected: list[int], tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    train(tmp_path, [measuring_rank_only(figures=every)], logger, epochs=epochs)
    assert drawn_at(logger.log_dir) == expected


def test_a_cadence_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="figures=0"):
        measuring(figures=0)


class Dropout(Regression):
    """Draws from the global generators in training."""

    def loss(self, batch: Any) -> Any:
        noise = torch.randn(()) + random.random() + np.random.rand()
        return super().loss((torch.nn.functional.dropout(batch[0], 0.2), batch[1] + 1e-3 * noise))


@pytest.mark.parametrize("failing", [False, True])
def test_weights_are_the_same_to_the_bit_with_and_without_figures(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(*callbacks: Any) -> list[Any]:
        L.seed_everything(11, verbose=False)
        module = Dropout()
        train(tmp_path, list(callbacks), CSVLogger(tmp_path), module=module)
        weights = [p.detach().clone() for p in module.parameters()]
        return [*weights, torch.get_rng_state(), torch.tensor(random.getstate()[1][:-1]),
                torch.from_numpy(np.random.get_state()[1].astype(np.int64))]  # fmt: skip

    expected = outcome()
    settings = dict(matplotlib.rcParams), matplotlib.get_backend()
    if failing:
        monkeypatch.setattr(panels_module, "render", _fails)
    figures = measuring(figures=1, num_eigenvalues=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(figures)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == settings


def _fails(*_: Any, **__: Any) -> bytes:
    torch.rand(3)
    raise OSError("no space left on device")


def test_a_figure_that_fails_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = panels_module.render

    def fails_for_wide_ones(figure: Any, *arguments: Any) -> bytes:
        return _fails() if figure.get_size_inches()[0] == 9.0 else real(figure, *arguments)

    monkeypatch.setattr(panels_module, "render", fails_for_wide_ones)
    callback, logger = measuring(figures=1), CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, [callback], logger)
    assert trainer.global_step == 12
    messages = [str(w.message) for w in caught if "figures=None" in str(w.message)]
    assert len(messages) == 2  # the eigengaps and the density, each once
    assert "drawing eigengaps failed (OSError: no space left" in messages[0]
    assert len(drawn_at(logger.log_dir)) == 6


def test_a_logger_that_fails_costs_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    class WandbLogger(CSVLogger):
        """Is taken for W&B's by its name, and has none of what that has."""

    callback, good = measuring_rank_only(figures=2), CSVLogger(tmp_path, name="good")
    with pytest.warns(UserWarning, match="logging figures to WandbLogger failed"):
        trainer = train(tmp_path, [callback], [WandbLogger(tmp_path, name="bad"), good])
    assert trainer.global_step == 12
    assert drawn_at(good.log_dir) == [2, 6, 10, 12]


def test_loggers_are_known_by_their_ancestors() -> None:
    class Mine(CSVLogger):
        pass

    assert adapter(Mine(".")) is ADAPTERS["CSVLogger"]
    assert adapter(object()).pictures is None


def test_drawing_is_neither_measuring_nor_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    real, slow = panels_module.render, []

    def slowly(figure: Any, *arguments: Any) -> bytes:
        time.sleep(1)
        slow.append(1)
        return real(figure, *arguments)

    monkeypatch.setattr(panels_module, "render", slowly)
    callback = measuring_rank_only(figures=1)
    train(tmp_path, [callback], False, epochs=2)
    assert len(slow) == 4  # figures
    assert callback._panels.seconds > sum(slow)
    assert sum(row["seconds"] for row in callback.history) < 0.5 * sum(slow)
    assert callback._budgeting.account.trained < 0.5 * sum(slow), (
        "drawing would earn time to measure"
    )


# Resume ---------------------------------------------------------------------------------------


def test_correlations_cadence_and_emergence_survive_a_resume(tmp_path: Path) -> None:
    first, saved = measuring(figures=3), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    train(tmp_path, [first, saved], False, epochs=2, enable_checkpointing=True)
    second, logger = measuring(figures=3), CSVLogger(tmp_path)
    path = str(tmp_path / "checkpoints" / "last.ckpt")
    torch.load(path, weights_only=True)  # the state is primitives and tensors alone
    train(tmp_path, [second], logger, epochs=5, ckpt_path=path)
    assert [row["step"] for row in second.history] == list(range(1, 20, 2))
    assert second.history[:4] == first.history
    for (statistic, monitor), found in second.correlations().items():
        x, y = ([row[key] for row in second.history] for key in (statistic, monitor))
        expected = stats.pearsonr(x, y)
        assert found.num_points == 10
        assert found.r == pytest.approx(expected[0], abs=1e-9)
        np.testing.assert_allclose(found.interval, tuple(expected.confidence_interval()), rtol=1e-6)
        assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
    # Measurements 5 to 10 are new; of every third the seventh and the tenth are due.
    assert drawn_at(logger.log_dir) == [14, 20]
    assert [step for step, _ in second._panels.spectra] == list(range(1, 20, 2))
    assert len(read_spectra(logger.log_dir)["hessian"]) == 6


def test_a_resume_from_earlier_forgets_what_came_later(tmp_path: Path) -> None:
    saved = ModelCheckpoint(
        tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=4
    )
    first = measuring_rank_only()
    train(tmp_path, [first, saved], False, epochs=3, enable_checkpointing=True)
    second = measuring_rank_only()
    path = str(tmp_path / "checkpoints" / "step=4.ckpt")
    train(tmp_path, [second], False, epochs=3, ckpt_path=path)
    steps = [step for step, _ in second._panels.spectra]
    assert steps == [row["step"] for row in second.history] == sorted(set(steps))


# The sibling ----------------------------------------------------------------------------------


def test_gradients_have_figures_and_spectra_too(tmp_path: Path) -> None:
    gradients = GradientStructureCallback(
        num_gradients=40,
        num_eigenvalues=10,
        time_budget=Budget(seconds=600),
        figures=4,
        on_error="raise",
    )
    logger = CSVLogger(tmp_path)
    train(tmp_path, [small_callback(figures=None), gradients], logger)
    names = {path.name for path in Path(logger.log_dir, "figures").glob("*.png")}
    assert names == {f"gradient_{name}_step_{step:08}.png" for name, step in [
        ("spectra", 1), ("spectra", 9), ("spectra", 11), ("scatter_val_loss", 9),
        ("scatter_val_loss", 11), ("scatter_gap", 9), ("scatter_gap", 11)]}  # fmt: skip
    found = read_spectra(logger.log_dir)["gradient"]
    assert gradients.last_structure is not None
    np.testing.assert_allclose(
        found[-1][1].eigenvalues, gradients.last_structure.leading, rtol=1e-6
    )

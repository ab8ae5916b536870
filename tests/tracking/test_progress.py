"""The bar beside Lightning's own: when it is seen, what it says, and that it breaks nothing."""

from __future__ import annotations

import io
import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from support.references import problem
from support.runs import train

from lightning_hessian import block_structure, hessian_spectrum
from lightning_hessian.tracking import progress as progress_module
from lightning_hessian.tracking.progress import Progress, summary_line

BAR = re.compile(
    r"hessian spectrum, (\d+) of 5 converged: +(\d+)%\|.*?\| (\d+)/(\d+) HVPs \[[\d:]+<[\d:?]+"
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars at once and at every product: the measurements here take no second."""
    monkeypatch.setattr(progress_module, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress_module, "_INTERVAL", 0.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fit_in_terminal(
    monkeypatch: pytest.MonkeyPatch, folder: Path, bars: list[Any], **arguments: Any
) -> tuple[str, Any]:
    """Trains with a terminal as standard output, and returns what it got."""
    terminal = Terminal()
    callback = small_callback(blocks=None, **arguments.pop("callback", {}))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("COLUMNS", "150")
        patch.setenv("LINES", "40")
        patch.setenv("TERM", "xterm")
        arguments = {"enable_progress_bar": True, **arguments}
        train(folder, [*bars, callback], False, epochs=2, **arguments)
    return terminal.getvalue(), callback


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("position", [0, 1])
def test_beside_tqdm(position: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lightning_bar = TQDMProgressBar(process_position=position)
    screen, callback = fit_in_terminal(monkeypatch, tmp_path, [lightning_bar])
    states = [tuple(map(int, found)) for found in BAR.findall(screen)]
    assert states
    for converged, percent, done, total in states:
        assert 0 <= converged <= 5
        assert done <= total
        assert percent == pytest.approx(100 * done / total, abs=1)
    assert max(done for _, _, done, _ in states) <= max(r["num_hvps"] for r in callback.history)
    # One line a measurement, with its numbers, and Lightning's own bar to its end.
    for row in callback.history:
        assert screen.count(summary_line("hessian", row["step"], row)) == 1
    assert re.search(r"Epoch 1: 100%\|.*4/4 \[", screen)
    assert "Validation DataLoader 0: 100%" in screen
    assert lightning_bar.train_progress_bar.n == 4


@pytest.mark.usefixtures("impatient")
def test_beside_rich(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    from rich import get_console, reconfigure

    before = get_console().__dict__.copy()
    terminal = Terminal()
    arguments = {"file": terminal, "force_terminal": True, "width": 150}
    lightning_bar = RichProgressBar(refresh_rate=20, leave=True, console_kwargs=arguments)
    try:
        screen, callback = fit_in_terminal(
            monkeypatch, tmp_path, [lightning_bar], callback={"loss_fn": slow_loss}
        )
    finally:
        reconfigure()
        get_console().__dict__ = before
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue() + screen)
    assert re.search(r"hessian spectrum, \d of 5 converged, HVPs .* \d+/\d+ ", shown)
    for row in callback.history:
        assert summary_line("hessian", row["step"], row)[:60] in " ".join(shown.split())
    assert re.search(r"Epoch 1/1 .* 4/4 ", shown)
    assert lightning_bar.progress is not None
    task = lightning_bar.progress.tasks[lightning_bar.train_progress_bar_id]
    assert (task.completed, task.total) == (4, 4), "Lightning's task is still its own"


def slow_loss(module: Any, batch: Any) -> torch.Tensor:
    import time

    time.sleep(0.002)
    return module.loss(batch)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["trainer", "bar", "argument", "kind"])
def test_silent_where_bars_are_not_wanted(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ProgressBar

    class Quiet(ProgressBar):
        is_enabled = True

        def disable(self) -> None:
            pass

    bars = {"bar": [TQDMProgressBar(refresh_rate=0)], "kind": [Quiet()]}.get(how, [])
    callback = {"progress": False} if how == "argument" else {}
    screen, _ = fit_in_terminal(
        monkeypatch, tmp_path, bars, callback=callback, enable_progress_bar=how != "trainer"
    )
    assert "hessian" not in screen
    assert "HVPs" not in screen


def test_silent_below_a_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen, callback = fit_in_terminal(monkeypatch, tmp_path, [TQDMProgressBar()])
    assert max(row["seconds"] for row in callback.history) < 1
    assert "hessian" not in screen


def test_silent_on_other_ranks() -> None:
    """There Lightning disables its own bar."""
    bar = TQDMProgressBar()
    bar.disable()
    progress = Progress(bar, "hessian")
    progress(5, 1)
    assert not progress.visible


@pytest.mark.usefixtures("impatient")
def test_a_bar_that_breaks_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(progress_module.TqdmBar, "show", broken)
    with pytest.warns(UserWarning, match="progress bar of the measurement failed"):
        _, callback = fit_in_terminal(monkeypatch, tmp_path, [TQDMProgressBar()])
    assert len(callback.history) == 4


@pytest.mark.usefixtures("impatient")
def test_a_measurement_that_fails_takes_its_bar_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def fails_late(module: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise ArithmeticError("half way")
        return module.loss(batch)

    closed = []
    real = progress_module.TqdmBar.close
    monkeypatch.setattr(
        progress_module.TqdmBar, "close", lambda self: (closed.append(1), real(self))
    )
    arguments = {"loss_fn": fails_late, "on_error": "warn", "hvp": "recompute"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_in_terminal(monkeypatch, tmp_path, [TQDMProgressBar()], callback=arguments)
    assert closed


# What the measuring functions report ----------------------------------------------------------


def test_a_spectrum_reports_every_product_and_what_has_converged() -> None:
    given = problem("convolution")
    calls: list[tuple[int, int | None]] = []
    found = hessian_spectrum(
        given.module, given.loss_fn, given.batches, num_eigenvalues=6, trace_probes=3,
        on_progress=lambda *state: calls.append(state),
    )  # fmt: skip
    products = [products for products, _ in calls]
    assert products == sorted(products)
    assert products[-1] == found.num_hvps
    assert len(set(products)) >= found.num_hvps - 1
    assert calls[0][1] == 0
    assert calls[-1][1] == found.num_converged == 6


def test_blocks_report_products() -> None:
    given = problem("convolution")
    calls: list[tuple[int, int | None]] = []
    found = block_structure(
        given.module, given.loss_fn, given.batches, on_progress=lambda *state: calls.append(state)
    )
    assert calls
    assert max(products for products, _ in calls) <= found.num_hvps
    assert {converged for _, converged in calls} == {None}


def test_the_line_leaves_out_what_is_absent() -> None:
    row = {"num_converged": 5.0, "num_eigenvalues": 5.0, "num_hvps": 30.0, "seconds": 1.24}
    assert (
        summary_line("hessian", 7, row) == "hessian at step 7: 5 of 5 converged in 30 HVPs, 1.2 s"
    )
    assert "nan" not in summary_line("gradient", 7, {"seconds": math.pi, "num_gradients": 4.0})


def test_a_module_trains_the_same_beside_a_bar(tmp_path: Path) -> None:
    weights = []
    for arguments in ({}, {"progress": False}):
        module = Regression()
        torch.manual_seed(1)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        train(tmp_path, [small_callback(**arguments)], False, module=module)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

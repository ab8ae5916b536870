"""The figure of stability: what it draws, and what of a long run it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader

from lightning_hessian import EveryNTrainSteps
from lightning_hessian.tracking.stability_figures import StabilityCurve, stability_plot

MakeTrainer = Callable[..., Any]


def test_the_ratio_with_the_line_at_one_and_the_loss_beneath() -> None:
    points = [(10, 0.5, 2.0), (20, 1.1, 1.0), (30, 0.9, 0.5)]
    above, below = stability_plot(points).axes
    ratio, line = above.get_lines()
    assert list(ratio.get_xdata()) == [10, 20, 30]
    assert list(ratio.get_ydata()) == [0.5, 1.1, 0.9]
    assert list(line.get_ydata()) == [1.0, 1.0]
    assert line.get_linestyle() == "--"
    low, high = above.get_ylim()
    assert low <= 0 < 1.1 < high
    (loss,) = below.get_lines()
    assert list(loss.get_ydata()) == [2.0, 1.0, 0.5]
    assert below.get_yscale() == "log"
    # A loss that is not positive, as a likelihood of densities may be, has no logarithm.
    assert stability_plot([(1, 0.5, -1.0), (2, 0.6, -2.0)]).axes[1].get_yscale() == "linear"


def test_a_long_run_keeps_points_of_all_its_length() -> None:
    curve = StabilityCurve()
    for step in range(10_000):
        curve.add(step, {"stability/ratio": step / 10_000, "stability/loss": 1.0})
        curve.add(step, {"lambda_1": 3.0})
    steps = [step for step, _, _ in curve.points]
    assert steps == sorted(set(steps))
    assert 1000 <= len(steps) <= 2000
    assert steps[0] == 0
    assert steps[-1] > 9900
    curve.add(5000, {"stability/ratio": 0.0, "stability/loss": 1.0})  # resumed from there
    assert curve.points[-1] == (5000, 0.0, 1.0)
    assert max(step for step, _, _ in curve.points) == 5000


def test_the_callback_draws_what_is_between_whole_measurements_too(
    make_trainer: MakeTrainer,
) -> None:
    callback = small_callback(
        blocks=None, every_n_validations=EveryNTrainSteps(2), time_budget=None, monitor="val_loss"
    )
    make_trainer(callback, max_epochs=5).fit(Regression(), train_loader(), val_loader())
    points = callback._stability.points
    assert [step for step, _, _ in points] == list(range(1, 20, 2))
    whole = {row["step"]: row for row in callback.history}
    for step, ratio, _ in points:
        if step in whole:
            assert ratio == whole[step]["stability/ratio"]
            assert points[step // 2][2] == pytest.approx(whole[step]["loss"])
    above, _ = callback.drawings()["stability"]().axes
    assert len(above.get_lines()[0].get_xdata()) == 10
    assert {name for name, _ in callback.correlations()} >= {
        "stability/ratio", "stability/update_curvature", "stability/gradient_share"
    }  # fmt: skip

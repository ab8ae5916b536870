"""A long run costs no more per measurement than a short one."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_hessian.tracking import panels as panels_module
from lightning_hessian.tracking.correlation_figures import scatter_plot
from lightning_hessian.tracking.figures import emergence_plot
from lightning_hessian.tracking.history import History
from lightning_hessian.tracking.panels import Panels
from lightning_hessian.tracking.spectra import encode_spectrum
from lightning_hessian.tracking.style import evenly_chosen


def _code(seed: int) -> str:
    values = np.sort(np.random.default_rng(seed).random(5))[::-1]
    return encode_spectrum(values, np.zeros(5), np.ones(5, dtype=bool))


def test_what_is_not_due_is_not_decoded(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(panels_module, "decode_spectrum", lambda code: decoded.append(code))
    panels = Panels("hessian", 10)
    for count in range(2, 10):
        panels.add_spectrum(_code(count), count, [], tmp_path)
        assert not panels.is_due(count)
    assert decoded == []
    assert panels.is_due(11)


def test_spectra_kept_are_bounded_and_span_the_run(tmp_path):
    panels = Panels("hessian", 10)
    code = _code(0)
    for step in range(3000):
        panels.add_spectrum(code, step, [], tmp_path)
    steps = [step for step, _ in panels.spectra]
    assert 100 < len(panels.state_dict()["spectra"]) == len(steps) <= 400
    assert steps[0] == 0
    assert steps[-1] == 2999
    assert steps == sorted(steps)


@pytest.mark.parametrize("count", [1, 2, 60, 61, 1000])
def test_evenly_chosen_keeps_both_ends(count):
    spectra = [(step, np.ones(2)) for step in range(count)]
    chosen = [step for step, _ in evenly_chosen(spectra, 60)]
    assert len(chosen) == min(count, 60)
    assert chosen[0] == 0
    assert chosen[-1] == count - 1


def test_figures_of_a_long_run_draw_some_and_tell_all():
    rows = [
        {"step": i, "d_ks": float(np.sin(i)), "val_loss": float(np.cos(i))} for i in range(4000)
    ]
    figure = scatter_plot(rows, ["d_ks"], "val_loss")
    (axes,) = figure.axes
    assert len(axes.collections[0].get_offsets()) <= 500
    assert "n = 4000" in axes.get_title()
    spectra = [(step, np.array([2.0, 1.0])) for step in range(4000)]
    figure = emergence_plot(spectra)
    assert "4000 measurements" in figure.axes[0].get_title()


def test_adding_a_row_looks_at_the_last_rows_only():
    class Watched(dict):
        looked_at = 0

        def __getitem__(self, key):
            Watched.looked_at += 1
            return super().__getitem__(key)

    history = History()
    history.rows = [Watched(step=i) for i in range(1000)]
    history.add({"step": 998})
    assert [row["step"] for row in history.rows[-2:]] == [997, 998]
    assert Watched.looked_at < 10

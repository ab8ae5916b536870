"""The example at the edge of stability, a few steps of it, on images made here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "edge_of_stability" / "cifar10.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("edge_of_stability_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edge_of_stability_example", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUM_IMAGES", 40)
    return module


def test_a_table_and_a_figure(example, tmp_path, monkeypatch, capsys):
    (tmp_path / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "cifar10" / "cifar10-subset.npz",
        train_images=rng.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8),
        train_labels=rng.integers(0, 10, 40),
    )
    full = example.RUNS["gd"]
    run = example.Run(full.title, full.optimizer, 40, steps=40, every=15)
    monkeypatch.setattr(example, "RUNS", {"gd": run, "sgd": example.RUNS["sgd"]})
    out = tmp_path / "figure.png"
    given = ["cifar10.py", "--data-dir", str(tmp_path), "--out", str(out), "--steps", "40"]
    monkeypatch.setattr(sys, "argv", given)
    found = {}
    draw = example.figure
    monkeypatch.setattr(example, "figure", lambda rows: draw(found.setdefault("rows", rows)))
    example.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    for name in ("gd", "sgd"):
        rows = found["rows"][name]
        assert rows["step"].tolist() == [14, 29, 39]  # and the whole one, when training has ended
        np.testing.assert_allclose(rows["stability/threshold"], 40.0)  # 2 / 0.05
        np.testing.assert_allclose(rows["stability/ratio"], rows["stability/sharpness"] / 40)
        assert np.isfinite(rows["stability/loss"]).all()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["gd", "sgd"]


def test_without_the_images_it_says_so(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cifar10.py", "--data-dir", str(tmp_path)])
    example.main()
    assert capsys.readouterr().out.startswith("skipped: ")

"""The pages say what the results say, and what of it agrees with the papers."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples" / "papers"))  # last: the modules there have plain names

hpl, made, pages = map(importlib.import_module, ("hpl", "made", "pages"))


def test_the_pages_say_what_the_results_say():
    for name, text in pages.pages().items():
        assert (ROOT / "docs" / "papers" / name).read_text() == text, "run examples/papers/pages.py"


def test_what_agrees(tmp_path):
    row = next(row for row in hpl.ROWS if row.id == "hpl-7-mnist-n1000")  # Yes, 2.128, 0.886
    numbers = {"k": 1000, "d_ks": 0.03, "d_c": 0.043, "power_law": True, "p_value": 0.1, "s": 0.95,
               "beta": 2.05, "sigma": 0.03, "k_of_least_d_ks": 9}  # fmt: skip
    other = {**numbers, "power_law": False, "s": 1.3}
    about = {"num_train": 1000, "num_published": 60_000, "probe": 1000, "test_accuracy": 0.98712}
    content = {"seed": 0, "settings": "seed0", "about": about,
               "numbers": {"converged": numbers, "pooled": other}}  # fmt: skip
    (tmp_path / row.id).mkdir()
    (tmp_path / row.id / "seed0.json").write_text(json.dumps(content))
    (one,) = [one for one in made.read(hpl.ROWS, tmp_path) if one.own]
    assert made.verdict(one, "converged") is True
    assert made.verdict(one, "pooled") is False
    # They differ by 0.064, and two standard errors are 2 sqrt((0.886^2 + 0.95^2) / 1000) = 0.082.
    assert made.slope_agrees(one, "converged") is True
    assert made.slope_agrees(one, "pooled") is False
    assert pages.setting(one) == ""  # N = 1000 is the paper's own
    assert pages.counts(made.read(hpl.ROWS, tmp_path), "converged")["made"] == 1
    table = [line.split(" | ") for line in pages.page("hpl", [one]).splitlines() if " | " in line]
    place = table[0].index("test accuracy")
    assert [line[place] for line in table[1:]] == ["", "98.7%", ""]  # the paper, converged, pooled


def test_a_network_that_has_hardly_trained_is_named():
    about = {"num_train": 60_000, "num_published": 60_000, "probe": 60_000}

    def said(name, accuracy, seeds=1):
        row = next(row for row in hpl.ROWS if row.id == name)
        results = ({"about": {**about, "test_accuracy": accuracy}, "numbers": {}},) * seeds
        return pages.setting(made.Made(row, results, ()))

    name = "hpl-7-mnist-b1024"
    assert said(name, 0.1135) == (
        "The network has hardly trained: 11.3% of the test right, 10% by guessing."
    )
    assert said(name, 0.1135, seeds=2).startswith("At seed 0 the network has hardly trained")
    assert said(name, 0.21) == ""
    assert said("hpl-7-mnist-random", 0.1) == ""  # nobody trained it
    assert "1% by guessing" in said("hpl-8-cifar100-sgd", 0.019)
    assert "guessing" not in said("hpl-8-cifar100-sgd", 0.021)


def test_the_summary_counts_rows_of_networks_that_have_hardly_trained_by_name():
    def text(accuracy):
        (one,) = [one for one in made.read(hpl.ROWS) if one.row.id == "hpl-7-mnist-b1024"]
        first = {**one.own[0], "about": {**one.own[0]["about"], "test_accuracy": accuracy}}
        return pages.summary({"hpl": [replace(one, own=(first,))]}, "")

    assert "have hardly trained: `hpl-7-mnist-b1024`." in text(0.11)
    assert "hardly" not in text(0.9)


def test_what_the_seed_does(tmp_path):
    """Five seeds whose d_ks and s lie by hand: ln d_ks and ln s have deviations of 0.1 and 0.05."""
    row, near, far = (
        next(row for row in hpl.ROWS if row.id == f"hpl-7-mnist-n{count}")  # n800, n1000: Yes
        for count in (1000, 800, 600)
    )
    unit = np.array([-1.0, 0.0, 0.0, 0.0, 1.0]) * math.sqrt(2)  # of variance 1
    about = {"num_train": 1000, "num_published": 60_000, "probe": 1000}

    def write(row, seed, d_ks, s):
        numbers = {"k": 1000, "d_ks": d_ks, "d_c": 0.043, "power_law": d_ks < 0.043, "s": s,
                   "p_value": 0.1, "beta": 2.0, "sigma": 0.03, "k_of_least_d_ks": 9}  # fmt: skip
        content = {"seed": seed, "settings": f"seed{seed}", "about": about,
                   "numbers": {"converged": numbers}}  # fmt: skip
        (tmp_path / row.id).mkdir(exist_ok=True)
        (tmp_path / row.id / f"seed{seed}.json").write_text(json.dumps(content))

    for seed, step in enumerate(unit):
        write(row, seed, 0.02 * math.exp(0.1 * step), 0.95 * math.exp(0.05 * step))
    write(near, 0, 0.043 * math.exp(-0.19), 1.15)  # printed s = 1.004
    write(far, 0, 0.043 * math.exp(0.21), 1.0)
    found = made.read(hpl.ROWS, tmp_path)
    assert made.seed_spread(found, "converged", "d_ks") == pytest.approx(0.1)
    assert made.seed_spread(found, "converged", "s") == pytest.approx(0.05)
    assert made.seed_spread(found, "pooled", "s") is None
    by_id = {one.row.id: one for one in found}
    assert not made.is_beyond_seed(by_id[near.id], "converged", 0.1)
    assert made.is_beyond_seed(by_id[far.id], "converged", 0.1)
    # 0.146 apart: two standard errors are 0.097 without the seed and 0.181 with it.
    assert made.slope_agrees(by_id[near.id], "converged") is False
    assert made.slope_agrees(by_id[near.id], "converged", 0.05) is True
    counted = pages.counts(found, "converged")
    assert (counted["beyond the seed"], counted["same beyond the seed"]) == (2, 2)
    assert counted["slope with the seed"] == 2
    assert "beyond the seed" not in pages.counts(found, "pooled")
    text = pages.summary({"hpl": found}, "1. ...")
    assert "| HPL | converged | 3 of 101 | 3 of 3 | 2 of 2 | 1 of 2 | 2 of 2 |" in text
    assert "It moves converged values' d_ks by 10.0% and their s by 5.0%." in text

"""The experiments on block structure: small ones against dense Hessians and HBS's formulas."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.references import dense_hessian

from lightning_hessian import Budget, block_structure
from lightning_hessian.statistics import theory

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "block_structure"
sys.path.append(str(FOLDER))  # last: the modules there have plain names

class_maps, experiments, four_layers, gaussian, hbs_size, optimizer_gap, rare_classes, rates, \
    records, two_losses = map(
        importlib.import_module,
        ("class_maps", "experiments", "four_layers", "gaussian", "hbs_size", "optimizer_gap",
         "rare_classes", "rates", "records", "two_losses"),
    )  # fmt: skip

RARE = rare_classes.Settings(
    classes=6, inputs=5, samples=120, budgets=(5, 20), early=5, groups=3, sgd_rates=(0.1, 1.0),
    adam_rates=(0.01, 0.1),
)  # fmt: skip
SMALL = {
    "hbs_size": hbs_size.Settings(60, 6, 9, 3, 20),
    "class_maps": class_maps.Settings((2,), 10, 100, 4),
    "four_layers": four_layers.Settings(width=5, samples=60, steps=20),
    "optimizer_gap": optimizer_gap.Settings(
        images=64, probes=8, epochs=1, spreads=(1,), sgd_rates=(0.1,), adam_rates=(0.01,), seeds=1
    ),
    "rare_classes": RARE,
    "two_losses": two_losses.Settings(6, 7, 60, 4, 1, measured=1, imbalanced=RARE),
}


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"optimizer_gap"}))
def test_an_experiment_leaves_its_setting_its_numbers_and_figures(name, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.EXPERIMENTS[name], "Settings", lambda: SMALL[name])
    experiments.main(["--only", name, "--out", str(tmp_path)])
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["settings"] == records.rounded(asdict(SMALL[name]))
    assert content["versions"]["torch"] == torch.__version__
    figures = list(tmp_path.glob("*.png"))
    assert figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)


def test_every_experiment_is_run_here():
    assert set(SMALL) == set(experiments.EXPERIMENTS)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_committed_results_are_those_of_the_settings(name):
    content = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert content["settings"] == records.rounded(asdict(experiments.EXPERIMENTS[name].Settings()))
    figures = list((ROOT / "docs" / "block_structure").glob(f"{name}*.png"))
    assert figures
    assert all(path.stat().st_size < 80_000 for path in figures)


# Against dense Hessians ---------------------------------------------------------------------------


def dense(net, batch, loss_fn=gaussian.cross_entropy):
    """Return the Hessian in float64, as an array."""
    return dense_hessian(net, loss_fn, batch).numpy()


def test_links_and_families_at_hbs_size():
    neurons, inputs, classes = 3, 6, 9
    batch = gaussian.gaussian_batch(60, inputs, classes, 0)
    net = gaussian.relu_network((inputs, neurons, classes), 0)
    found = block_structure(
        net, gaussian.cross_entropy, [batch], blocks=hbs_size.links(neurons), exact=True
    )
    rows = hbs_size.families(found, neurons)
    squared = np.square(dense(net, batch))
    hidden = neurons * inputs
    between = squared[:hidden, hidden:].reshape(neurons, inputs, classes, neurons)
    assert rows["norm_wv"] == pytest.approx(np.sqrt(2 * between.sum()), rel=1e-4)
    assert rows["share_vv"] == pytest.approx(squared[hidden:, hidden:].sum() / squared.sum(), 1e-4)
    linked = sum(between[i, :, :, i].sum() for i in range(neurons))
    assert rows["wv_in_links"] == pytest.approx(linked / between.sum(), rel=1e-4)
    # Where the network is linear in its logits, the errors stand in H_wv beside Gauss-Newton.
    newton = block_structure(
        net, gaussian.cross_entropy, [batch], matrix="gauss_newton", blocks="neuron",
        return_matrix=True,
    ).matrix  # fmt: skip
    errors = 2 * np.square(dense(net, batch) - newton)[:hidden, hidden:].sum()
    assert hbs_size.norm_of_errors(net, batch) == pytest.approx(np.sqrt(errors), rel=1e-3)


def test_every_block_by_products_and_by_formula():
    batch = gaussian.gaussian_batch(60, 6, 9, 0)
    net = gaussian.relu_network((6, 3, 9), 0)
    numbers, _ = hbs_size.every_block(net, batch, "")
    assert numbers["blocks"] == 12
    assert numbers["diagonal_error"] < 1e-5  # small enough for all columns, not probes
    assert numbers["ratio_ww"] == pytest.approx(numbers["ratio_ww_formula"], rel=1e-4)
    assert numbers["norm_formula"] == pytest.approx(np.linalg.norm(dense(net, batch)), rel=1e-6)


def test_two_classes_show_no_structure():
    """HBS: p_1 (1 - p_1) = p_1 p_2, so that all blocks have one norm."""
    row = class_maps.measure(SMALL["class_maps"]).numbers["ratios"][0]
    assert row["linear"] == pytest.approx(1.0, rel=1e-5)


def test_links_between_layers():
    width, layers = 4, 3
    batch = gaussian.gaussian_batch(40, width, width, 0)
    net = gaussian.relu_network((width,) * (layers + 1), 0)
    found = block_structure(
        net, gaussian.cross_entropy, [batch], blocks="neuron", return_matrix=True
    )
    shares = four_layers.shares_in_links(found, layers, width)
    squared = np.square(dense(net, batch))
    for a, name in enumerate(("12", "23")):
        linked = total = 0.0
        for i, j in np.ndindex(width * width, width * width):
            entry = squared[a * width**2 + i, (a + 1) * width**2 + j]
            total += entry
            linked += entry * (i // width == j % width)  # row of one, column of the next
        assert shares[name] == pytest.approx(linked / total, rel=1e-4)


# The constructions --------------------------------------------------------------------------------


def test_a_rescaled_cnn_computes_the_same_and_its_blocks_are_multiplied():
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    made = []
    for spread in (1, 4):
        torch.manual_seed(0)
        made.append(optimizer_gap.rescaled_cnn(spread))
    plain, rescaled = made
    torch.testing.assert_close(rescaled(images), plain(images), rtol=1e-4, atol=1e-5)
    norms = [
        # The least probes, six on each layer, which are the same in both.
        block_structure(
            net, gaussian.cross_entropy, [(images, labels)], budget=Budget(products=30)
        ).frobenius
        for net in made
    ]
    factors = np.array([4, 1 / 4, 4, 1 / 4, 4])
    np.testing.assert_allclose(norms[1], norms[0] * np.outer(factors, factors), rtol=1e-3)


def test_counts_of_classes():
    settings = rare_classes.Settings()
    counts = rare_classes.class_counts(settings, balanced=False)
    assert counts.sum() == settings.samples
    expected = settings.samples / np.arange(1, 65) / (1 / np.arange(1, 65)).sum()
    assert np.abs(counts - expected).max() <= 1
    assert set(rare_classes.class_counts(settings, balanced=True)) == {64}


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
def test_traces_of_classes_are_those_of_the_formulas(loss):
    """HBS cases 1 and 2."""
    counts = rare_classes.class_counts(RARE, balanced=False)
    inputs, labels = rare_classes.class_batch(RARE, counts)
    net = gaussian.relu_network((RARE.inputs, RARE.classes), 0)
    found = rare_classes.blocks_of_classes(net, two_losses.LOSSES[loss], (inputs, labels))
    x = inputs.double().numpy()
    if loss == "cross-entropy":
        expected = theory.linear_cross_entropy_hessian(x, net[0].weight.detach().double().numpy())
    else:
        expected = theory.linear_mse_hessian(x, RARE.classes)
    parts = np.split(np.diagonal(expected), RARE.classes)
    trace, largest = rare_classes.trace_and_largest(found)
    np.testing.assert_allclose(trace, [part.sum() for part in parts], rtol=1e-4)
    first = expected[: RARE.inputs, : RARE.inputs]
    assert largest[0] == pytest.approx(np.linalg.eigvalsh(first)[-1], rel=1e-4)


def test_under_the_squared_error_classes_are_alike_and_do_not_meet():
    rows = two_losses.along_training(SMALL["two_losses"], gaussian.gaussian_batch(60, 6, 7, 0),
                                     "squared error")  # fmt: skip
    assert {row["ratio_vv"] for row in rows} == {0.0}
    assert max(row["class_heterogeneity"] for row in rows) < 1e-4


def test_the_best_learning_rate():
    assert rates.best({0.1: 2.0, 1.0: 1.0, 10.0: float("nan")}) == rates.Best(1.0, 1.0, False)
    assert rates.best({0.1: 0.5, 1.0: 1.0}).at_the_edge


def test_slope_of_traces():
    counts = np.array([8, 4, 2, 1])
    assert rare_classes.slope(counts, counts.astype(float) ** 0.5) == pytest.approx(0.5)
    assert rare_classes.slope(np.full(4, 3), counts.astype(float)) is None


def test_a_training_is_repeated():
    settings = replace(SMALL["optimizer_gap"], images=32)
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    given = (lambda: optimizer_gap.rescaled_cnn(2), "Adam", 0.01, 3, images, labels, settings)
    assert optimizer_gap.final_loss(*given) == optimizer_gap.final_loss(*given) < 2.5

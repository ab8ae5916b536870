"""The papers' rows: their digits, and one row against a dense Hessian."""

from __future__ import annotations

import csv
import dataclasses
import doctest
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jacrev

from lightning_hessian import fit_power_law
from lightning_hessian.statistics.power_law import exponent_std_error, slope
from lightning_hessian.statistics.significance import critical_value

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "papers"
sys.path.append(str(FOLDER))  # last: the modules there have plain names

cost, data, hpl, measure, networks, recipes, rows, run, sg = map(
    importlib.import_module,
    ("cost", "data", "hpl", "measure", "networks", "recipes", "rows", "run", "sg"),
)

with (ROOT / "tests" / "statistics" / "hpl_tables.csv").open(newline="") as file:
    COPIED = {(line["table"], line["row"]): line for line in csv.DictReader(file)}


# The tables ---------------------------------------------------------------------------------------


def test_every_row_has_a_name_of_its_own():
    assert len({row.id for row in run.ROWS}) == len(run.ROWS) == 183
    assert all(row.id.startswith((f"hpl-{row.table}-", "hpl-28-")) for row in hpl.ROWS)
    assert all(row.id.startswith(f"sg-{row.table}-") for row in sg.ROWS)


def test_the_digits_of_hpl_are_those_copied_from_it_before():
    compared = 0
    for row in hpl.ROWS:
        if row.table.startswith("figure"):
            continue
        line = COPIED[row.table, row.label]
        printed = row.printed
        found = [printed.d_ks, printed.d_c, printed.verdict, printed.beta, printed.sigma, printed.s]
        names = ("d_ks", "d_c", "verdict", "beta", "sigma", "s")
        assert found == [line[name] or None for name in names], row.id
        assert row.measure.k == int(line["k"])
        compared += 1
    tables = ("2", "5", "7", "8", "9", "10")
    assert compared == 98
    left = {key for key in COPIED if key[0] in tables} - {(r.table, r.label) for r in hpl.ROWS}
    assert {table for table, _ in left} == {"2"}  # language models that are not here


def test_what_is_printed_agrees_with_itself():
    for row in run.ROWS:
        printed, k = row.printed, row.measure.k
        if printed.verdict and printed.d_ks:
            assert (printed.verdict == "Yes") == (float(printed.d_ks) < float(printed.d_c)), row.id
        if printed.d_c != "0.176":  # HPL's own for K = 50, against its table 6
            assert critical_value(k, 0.05) == pytest.approx(float(printed.d_c), abs=5e-5), row.id
        if printed.beta:  # the misprints are named in tests/statistics/test_hpl_tables.py
            beta = float(printed.beta)
            assert float(printed.sigma) == pytest.approx(exponent_std_error(beta, k), rel=0.3)
            assert float(printed.s) == pytest.approx(slope(beta), rel=0.08)


def test_rows_of_a_network_share_it_whatever_is_measured():
    by_id = {row.id: row for row in run.ROWS}
    first = by_id["hpl-7-mnist-sgd"].network
    for other in (
        "hpl-7-mnist-eigengap",
        "hpl-7-mnist-epoch10",
        "hpl-7-mnist-b128",
        "sg-6-pretrain-b1",
    ):
        assert by_id[other].network.key == first.key
    assert by_id["hpl-7-mnist-b512"].network.key != first.key


def test_every_network_can_be_built_and_its_cost_told():
    for row in run.ROWS:
        classes = row.network.data.num_classes
        shape = {
            "avila": (10,), "shakespeare": (256,), "cifar-100": (3, 32, 32),
            "cifar-10": (3, 32, 32),
        }.get(row.network.data.name, (1, 28, 28))  # fmt: skip
        with torch.device("meta"):
            module = networks.build(row.network.model, shape, classes)
            inputs = torch.zeros(2, *shape, dtype=torch.long if classes == 65 else None)
            if "bn" not in row.network.model and classes != 65:
                assert module(inputs).shape == (2, classes)
        assert cost.expected_minutes([row]) > 0
        recipe = row.network.recipe
        assert recipe is None or recipe.optimizer in recipes.OPTIMIZERS


def test_doctests():
    assert doctest.testmod(networks).failed == 0
    assert doctest.testmod(networks).attempted >= 3


# Rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make two rows of one small network, on 80 rows in Avila's format."""
    folder = tmp_path_factory.mktemp("papers")
    (folder / "avila").mkdir()
    rng = np.random.default_rng(0)
    for name in ("avila-tr.txt", "avila-ts.txt"):
        lines = [
            ",".join([*(f"{x:.4f}" for x in rng.standard_normal(10)), "ABCDEFGHIWXY"[i % 12]])
            for i in range(80)
        ]
        (folder / "avila" / name).write_text("\r\n".join(lines) + "\r\n")
    recipe = rows.Recipe(epochs=4, drops=(0.5,), batch_size=16)
    network = rows.Network("fcn-2x4", rows.Samples("avila"), recipe)
    hessian = rows.Hessian(k=25, probe=None)
    printed = rows.Printed("0.1", verdict="Yes")
    some = [
        rows.Row("early", "0", "early", network, hessian, printed, epoch=2),
        rows.Row("late", "0", "late", network, hessian, printed),
        rows.Row(
            "gradients", "0", "G", network, rows.Gradients(4, "covariance", count=90, k=60), printed
        ),
    ]
    found = {}
    measure.measure_rows(
        some, measure.Settings(), folder, folder / "networks",
        lambda row, numbers: found.setdefault(row.id, numbers),
    )  # fmt: skip
    return folder, network, some, found


def test_a_row_is_the_dense_hessian_of_its_trained_network(small):
    folder, network, _, found = small
    assert list(found) == ["early", "late", "gradients"]
    samples = data.load(folder, network.data).to(torch.float64)
    module = networks.build(network.model, (10,), 12).double()
    module.load_state_dict(torch.load(folder / "networks" / f"{network.key}-seed0-float64.pt"))
    parameters = dict(module.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat):
        parts = dict(zip(parameters, flat.split(sizes), strict=True))
        parts = {name: parts[name].view_as(parameters[name]) for name in parts}
        outputs = functional_call(module, parts, (samples.inputs,))
        return torch.nn.functional.cross_entropy(outputs, samples.labels)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    values = torch.linalg.eigvalsh(jacrev(grad(loss))(flat)).flip(0).numpy()
    dense = fit_power_law(values, 25)
    numbers = found["late"]["numbers"]["converged"]
    assert numbers["num_converged"] == 25
    assert numbers["lambda_1"] == pytest.approx(values[0], rel=1e-5)
    assert numbers["d_ks"] == pytest.approx(dense.ks_distance, rel=1e-3)
    assert numbers["s"] == pytest.approx(dense.slope, rel=1e-3)
    thinned = numbers["spectrum"]
    ranks = np.array(thinned["ranks"])
    assert (ranks[0], ranks[-1]) == (1, 25)
    np.testing.assert_allclose(thinned["values"], values[ranks - 1], rtol=1e-3)
    assert found["late"]["about"]["probe"] == 80
    assert found["late"]["about"]["probe_loss"] == pytest.approx(float(loss(flat)), rel=1e-6)
    # Three runs find the top of 104 eigenvalues three times.
    pooled = fit_power_law(np.repeat(values, 3), 25)
    assert found["late"]["numbers"]["pooled"]["d_ks"] == pytest.approx(pooled.ks_distance, rel=1e-3)
    assert found["early"]["numbers"]["converged"]["lambda_1"] != numbers["lambda_1"]


def test_a_trained_network_is_not_trained_again(small):
    folder, _, some, found = small
    late = [row for row in some if row.id == "late"]
    again = {}
    measure.measure_rows(
        late, measure.Settings(), folder, folder / "networks",
        lambda row, numbers: again.setdefault(row.id, numbers),
    )  # fmt: skip
    assert "training_seconds" in found["late"]["about"]
    assert "training_seconds" not in again["late"]["about"]
    for name in ("d_ks", "s", "lambda_1"):
        expected = found["late"]["numbers"]["converged"][name]
        assert again["late"]["numbers"]["converged"][name] == pytest.approx(expected, rel=1e-9)


def test_another_precision_measures_the_same_trained_network(small):
    folder, _, some, found = small
    again = {}
    measure.measure_rows(
        some[1:2], measure.Settings(precision="float32"), folder, folder / "networks",
        lambda row, numbers: again.setdefault(row.id, numbers),
    )  # fmt: skip
    about, numbers = again["late"]["about"], again["late"]["numbers"]["converged"]
    assert (about["precision"], about["trained_in"]) == ("float32", "float64")
    assert "training_seconds" not in about
    expected = found["late"]["numbers"]["converged"]["lambda_1"]
    assert numbers["lambda_1"] == pytest.approx(expected, rel=1e-5)
    assert numbers["lambda_1"] != expected


def test_what_is_there_is_not_made_again_and_what_is_missing_is_skipped(tmp_path, capsys):
    common = ["--data-dir", str(tmp_path), "--results", str(tmp_path / "results"),
              "--work-dir", str(tmp_path)]  # fmt: skip
    by_id = {row.id: row for row in run.ROWS}
    run.save(by_id["hpl-7-mnist-n600"], measure.Settings(), {}, tmp_path / "results")
    assert run.is_made(by_id["hpl-7-mnist-n600"], "seed0", tmp_path / "results")
    run.main([*common, "--rows", "hpl-7-mnist-n600", "hpl-7-fashion-random"])
    said = capsys.readouterr().out
    assert "1 results are there; 1 networks to go" in said
    assert "hpl-7-fashion-random, seed 0: 0 made" in said
    assert "fashion-mnist" in said.split("skipped: ")[1]
    assert "0 made, 1 skipped, 0 failed, 0 left" in said
    run.main([*common, "--rows", "hpl-7-fashion-random", "--budget-minutes", "0"])
    assert "0 made, 0 skipped, 0 failed, 1 left" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="hpl-77"):
        run.main([*common, "--rows", "hpl-77"])


def test_a_row_that_another_table_prints_again_is_measured_once(tmp_path, capsys):
    by_id = {row.id: row for row in run.ROWS}
    first, again = by_id["hpl-7-mnist-b128"], by_id["hpl-5-b128"]
    assert first.printed != again.printed
    run.save(first, measure.Settings(), {"numbers": {"a": 0.1}}, tmp_path / "results")
    run.main(["--data-dir", str(tmp_path), "--results", str(tmp_path / "results"),
              "--rows", again.id])  # fmt: skip
    assert "1 results are there; 0 networks to go" in capsys.readouterr().out
    kept = json.loads(run.result_file(again, "seed0", tmp_path / "results").read_text())
    assert (kept["row"], kept["numbers"]) == (again.id, {"a": 0.1})
    assert not run.is_made(again, "seed1", tmp_path / "results")


def test_results_keep_six_digits_and_no_nan(small, tmp_path):
    _, _, some, found = small
    numbers = {**found["late"], "odd": [float("nan"), 1 / 3]}
    run.save(some[1], measure.Settings(probe=80), numbers, tmp_path)
    kept = json.loads((tmp_path / "late" / "seed0-probe80.json").read_text())
    assert kept["odd"] == [None, 0.333333]
    assert kept["row"] == "late"


def test_a_result_of_another_recipe_is_out_of_date(small, tmp_path):
    late = small[2][1]
    run.save(late, measure.Settings(), {}, tmp_path)
    assert run.is_made(late, "seed0", tmp_path)
    network = rows.Network(late.network.model, late.network.data, rows.Recipe(epochs=5))
    changed = rows.Row(late.id, late.table, late.label, network, late.measure, late.printed)
    assert not run.is_made(changed, "seed0", tmp_path)
    assert not run.is_made(late, "seed1", tmp_path)


def test_momentum_is_part_of_what_is_measured():
    by_id = {row.id: row for row in run.ROWS}
    row, plain = (by_id[f"sg-10-cifar-10-lenet-random-{kind}"] for kind in ("momentum", "sgd"))
    assert row.measure.run != plain.measure.run
    assert row.definition != plain.definition
    other = dataclasses.replace(row, measure=dataclasses.replace(row.measure, momentum=0.5))
    assert other.definition != row.definition


def test_all_results_are_of_rows_as_they_are():
    by_id = {row.id: row for row in run.ROWS}
    found = [json.loads(path.read_text()) for path in run.RESULTS.glob("*/*.json")]
    assert found
    for result in found:
        assert by_id[result["row"]].definition == result["definition"], result["row"]

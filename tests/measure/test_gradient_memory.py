"""What a measurement of SG's size takes: T = 5000 gradients of LeNet's 61,706 parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.gradient_oracles import classifier, cross_entropy, gradient_source

from lightning_hessian import MeasurementError, gradient_structure
from lightning_hessian.isolation.context import isolated
from lightning_hessian.operators.gradients.gram import gram_matrix
from lightning_hessian.operators.gradients.history import GradientHistory

GIB = 2**30

_SCRIPT = """
import json, resource, sys, time
import torch
from torch import nn
from lightning_hessian import gradient_structure

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
data = [(torch.randn(4000, 1, 28, 28), torch.randint(10, (4000,)))]
loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)

before = peak()
found = gradient_structure(
    model, loss, data, num_gradients=5000, batch_size=4, **json.loads(sys.argv[1]))
print(json.dumps({
    "before": before, "peak": peak(), "seconds": found.seconds,
    "n": found.num_parameters, "T": found.num_gradients, "computed": found.num_computed,
    "eigenvalues": found.covariance[:1000].tolist(),
    "tested": 0 if found.iteration_tests is None else len(found.iteration_tests.p_values)}))
"""


def _measured(**arguments: object) -> dict:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    found = json.loads(run.stdout)
    print({key: value for key, value in found.items() if key != "eigenvalues"})
    assert (found["n"], found["T"]) == (61_706, 5000)
    return found


@pytest.mark.slow
def test_history_within_four_gib_and_spectra_within_one() -> None:
    """The peak of the whole process, with the interpreter, torch and the data in it."""
    pytest.importorskip("resource")
    stored = _measured()
    assert stored["tested"] == 61_706
    assert stored["computed"] == 5000
    assert stored["peak"] < 4 * GIB
    streamed = _measured(tests=False, memory_budget=450e6)
    assert streamed["peak"] < GIB
    assert streamed["peak"] - streamed["before"] < 1.25 * 450e6, "the budget, and autograd's own"
    assert streamed["eigenvalues"] == pytest.approx(stored["eigenvalues"], rel=1e-5)


@pytest.mark.parametrize("held", [1, 7, 33, 40], ids=lambda b: f"{b} held")
def test_blocks_of_any_size_give_the_same_gram_matrix(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = classifier()
    source = gradient_source(module, cross_entropy, data, batch_size=4, num_minibatches=40)
    monkeypatch.setattr("lightning_hessian.operators.gradients.gram._plan", lambda *_: (held, 5))
    monkeypatch.setattr("lightning_hessian.operators.gradients.gram._TILE", 16)
    with isolated(module):
        found = gram_matrix(source, memory_budget=0.0)
        rows = source.rows(0, 40).double()
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-12, atol=1e-12)
    ends = [*range(held, 40, held), 40]
    assert source.num_computed - 40 == sum(ends), "once, and once for each later block"


def test_a_small_budget_recomputes_and_a_large_one_does_not() -> None:
    module, data = classifier()
    options: dict[str, Any] = {"batch_size": 4, "num_gradients": 120, "tests": False}
    large = gradient_structure(module, cross_entropy, data, **options)
    gram_bytes, row_bytes = 8 * 120**2, 4 * 57
    small = gradient_structure(
        module, cross_entropy, data, memory_budget=2 * gram_bytes, **options
    )  # fmt: skip
    assert large.num_computed == 120
    assert small.num_computed == 120, "the eigensolver takes more than the gradients"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lightning_hessian.measure.gradients._left_by_gram", lambda *_: 80 * row_bytes
        )
        small = gradient_structure(module, cross_entropy, data, **options)
    assert 2 * 120 <= small.num_computed <= 4 * 120
    np.testing.assert_allclose(small.covariance, large.covariance, rtol=1e-6, atol=1e-12)


def test_a_history_that_does_not_fit_is_mapped_from_a_file(tmp_path: Any) -> None:
    module, data = classifier()
    source = gradient_source(module, cross_entropy, data, batch_size=4, num_minibatches=120)
    with isolated(module):
        inside = GradientHistory.collect(source)
        outside = GradientHistory.collect(source, memory_budget=100.0, directory=tmp_path)
    assert inside.at_hand
    assert not outside.at_hand
    assert isinstance(outside.values, np.memmap)
    assert list(tmp_path.iterdir()) == [], "the file has no name, so that nothing stays behind"
    np.testing.assert_array_equal(outside.values, inside.values)
    np.testing.assert_array_equal(
        np.concatenate(list(outside.by_parameter())), np.concatenate(list(inside.by_gradient())).T
    )
    chosen = np.array([3, 17, 40])
    (block,) = outside.by_parameter(chosen)
    np.testing.assert_array_equal(block, inside.values[:, chosen].T)
    grams = [gram_matrix(history, memory_budget=1e9) for history in (inside, outside)]
    torch.testing.assert_close(grams[0], grams[1])


def test_a_history_too_large_for_the_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hessian.operators.gradients import history as gradient_history

    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(gradient_history.shutil, "disk_usage", lambda folder: usage)
    module, data = classifier()
    source = gradient_source(module, cross_entropy, data, batch_size=4)
    with pytest.raises(MeasurementError, match=r"G of 30 gradients of 57 .*Lower num_gradients"):
        GradientHistory.collect(source, memory_budget=100.0)


def test_too_many_gradients_for_the_budget_are_refused() -> None:
    module, data = classifier()
    with pytest.raises(MeasurementError, match=r"inner products of 120 .*raise memory_budget"):
        gradient_structure(module, cross_entropy, data, batch_size=1, memory_budget=2e5)
    source = gradient_source(module, cross_entropy, data, batch_size=1)
    with pytest.raises(MeasurementError, match=r"does not hold two of them. Raise it"):
        gram_matrix(source, memory_budget=400.0)

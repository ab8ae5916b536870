"""Gradients that end when the time is up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.gradient_oracles import classifier, cross_entropy
from torch import Tensor, nn

from lightning_hessian import MeasurementError, gradient_structure
from lightning_hessian.measure.budget import Budget
from lightning_hessian.probe.minibatches import draw_minibatches


@pytest.mark.parametrize("tests", [False, True])
def test_time_cuts_the_gradients_short(tests: bool) -> None:
    module, data = classifier(4000)
    calls = []

    def slow(module: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(module, batch)

    options: dict[str, Any] = {"batch_size": 1000, "num_gradients": 100, "tests": tests}
    with pytest.raises(MeasurementError, match=r"time was up after .*Allow more"):
        _with_pieces_of(
            5 if tests else 1,
            lambda: gradient_structure(module, slow, data, budget=Budget(seconds=1e-9), **options),
        )
    assert len(calls) == (5 if tests else 1)


def _with_pieces_of(count: int, call: Any) -> Any:
    from lightning_hessian.operators.gradients import gram
    from lightning_hessian.operators.gradients import history as gradient_history

    with pytest.MonkeyPatch.context() as patch:

        def pieces(gradients: Any, piece_bytes: float = 0) -> Any:
            total = gradients.num_gradients
            return ((i, min(i + count, total)) for i in range(0, total, count))

        patch.setattr(gradient_history, "pieces", pieces)
        patch.setattr(gram, "_plan", lambda *_: (50, count))
        return call()


@pytest.mark.parametrize("tests", [False, True])
def test_the_gradients_there_are_when_time_is_up_are_used(
    tests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    module, data = classifier(4000)
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    options: dict[str, Any] = {"batch_size": 40, "num_gradients": 100, "tests": tests}
    with pytest.warns(UserWarning, match=r"time was up after \d+ of 100 gradients; allow more"):
        found = _with_pieces_of(
            5,
            lambda: gradient_structure(
                module, cross_entropy, data, budget=Budget(seconds=7.5), **options
            ),
        )
    whole = draw_minibatches(data, batch_size=40, num_minibatches=100)
    kept = [whole[i] for i in range(found.num_gradients)]
    assert 20 <= found.num_gradients < 100
    expected = gradient_structure(module, cross_entropy, kept, tests=False)
    np.testing.assert_allclose(
        found.covariance, expected.covariance, rtol=1e-3, atol=1e-7 * expected.covariance[0]
    )

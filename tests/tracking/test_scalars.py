"""Group ratios: those within the hidden neurons and within the classes, against a dense Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call, grad, jacfwd

from lightning_hessian import block_structure
from lightning_hessian.tracking.history import History
from lightning_hessian.tracking.scalars import block_scalars


def _loss(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("blocks", ["neuron", "class", "layer"])
def test_group_ratios_are_those_of_the_dense_hessian(blocks):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
    net = net.double()
    batch = (torch.randn(20, 3, dtype=torch.float64), torch.randint(3, (20,)))
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(flat):
        parts = {"0.weight": flat[:12].view(4, 3), "2.weight": flat[12:].view(3, 4)}
        return nn.functional.cross_entropy(functional_call(net, parts, batch[0]), batch[1])

    H = jacfwd(grad(loss))(flat).numpy()

    def ratio(starts, size):
        norms = [[np.linalg.norm(H[a : a + size, b : b + size]) for b in starts] for a in starts]
        on = np.trace(norms) / len(starts)
        return (np.sum(norms) - np.trace(norms)) / (len(starts) * (len(starts) - 1)) / on

    expected = {"block_ratio_ww": ratio(range(0, 12, 3), 3),
                "block_ratio_vv": ratio(range(12, 24, 4), 4)}  # fmt: skip
    kept = {"neuron": expected.keys(), "class": {"block_ratio_vv"}, "layer": set()}[blocks]
    found = block_scalars(block_structure(net, _loss, [batch], blocks=blocks), blocks)
    found = {name: value for name, value in found.items() if name.startswith("block_ratio")}
    assert found == pytest.approx({name: expected[name] for name in kept}, rel=1e-6)


def test_correlations_of_a_history_that_grows_and_goes_back_are_scipys():
    rng = np.random.default_rng(0)
    history = History()
    for step in [*range(50), *range(40, 60)]:
        history.add({"step": step, "a": float(rng.random()), "b": float(rng.random())})
        found = history.correlations(["a"], ["b"])
        if len(history.rows) >= 4:
            series = [[row[key] for row in history.rows] for key in "ab"]
            assert found["a", "b"].r == pytest.approx(stats.pearsonr(*series)[0])
    assert [row["step"] for row in history.rows] == list(range(60))

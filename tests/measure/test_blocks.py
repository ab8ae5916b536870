"""`block_structure` against dense Hessians of real networks, its records, its promises."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from support.references import PROBLEMS, Problem, cross_entropy, dense_hessian, in_double, problem
from torch import Tensor, nn

from lightning_hessian import BlockRule, MeasurementError, block_structure
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions
from lightning_hessian.probe.partition import Blocks, Partition, partition
from lightning_hessian.results import BlockStructure
from lightning_hessian.solvers.block_norms import least_products
from lightning_hessian.statistics.heterogeneity import transformed_densities
from lightning_hessian.tracking.scalars import block_scalars

NETWORKS = (
    "mlp", "convolution", "batch_norm", "batch_norm_in_training", "tied_embedding",
    "multihead_attention", "dot_product_attention", "transformer_encoder", "lstm",
)  # fmt: skip


@functools.cache
def reference(name: str) -> tuple[Problem, Tensor]:
    given = problem(name)
    return given, given.hessian()


def dense_norms(hessian: Tensor, cut: Partition) -> np.ndarray:
    """Frobenius norms of the blocks of a dense Hessian over all of the partition's space."""
    parts = [(cut.labels == block).nonzero().flatten() for block in range(len(cut.names))]
    return np.array([[float(hessian[i][:, j].norm()) for j in parts] for i in parts])


def assert_norms(found: BlockStructure, expected: np.ndarray, tolerance: float) -> None:
    """To the tolerance relative to each norm, or to what rounding leaves of the whole."""
    rounding = 1e-7 * np.linalg.norm(expected) if found.dtype == "float32" else 0
    np.testing.assert_allclose(found.frobenius, expected, rtol=tolerance, atol=rounding)
    off = ~np.eye(len(expected), dtype=bool)
    ratio = expected[off].mean() / np.diagonal(expected).mean()
    assert found.off_diagonal_ratio == pytest.approx(ratio, rel=tolerance)
    share = np.square(expected[off]).sum() / np.square(expected).sum()
    assert found.off_diagonal_share == pytest.approx(share, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", ["layer", "neuron"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_is_that_of_the_dense_hessian(name, blocks, dtype):
    given, hessian = reference(name)
    module, batches = given.module, given.batches
    if dtype == torch.float64:
        module, batches = in_double(module), in_double(batches)
    cut = partition(module, blocks)
    found = block_structure(
        module,
        given.loss_fn,
        batches,
        blocks=blocks,
        exact=True,
        loss_options=LossOptions(mode=given.mode),
    )
    assert found.names == cut.names
    assert found.num_hvps == cut.space.size == len(hessian)
    assert_norms(found, dense_norms(hessian, cut), 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("blocks", ["head", "adam_mini", {"a": "*weight", "b": "*bias"}],
                         ids=["head", "adam_mini", "mapping"])  # fmt: skip
def test_other_partitions_of_attention(blocks):
    given, _ = reference("multihead_attention")
    cut = partition(given.module, blocks)
    hessian = dense_hessian(given.module, given.loss_fn, given.whole, cut.space.names)
    found = block_structure(given.module, given.loss_fn, given.batches, blocks=blocks, exact=True)
    assert_norms(found, dense_norms(hessian, cut), 1e-5)


@pytest.mark.parametrize("name", ["mlp", "convolution", "multihead_attention"])
def test_probes_agree_with_the_dense_hessian(name):
    given, hessian = reference(name)
    found = block_structure(
        given.module, given.loss_fn, given.batches, exact=False, rel_error=0.01, seed=1
    )
    expected = dense_norms(hessian, partition(given.module, "layer"))
    assert not found.exact
    upper = np.triu_indices(len(expected))
    errors = np.where(found.std_error > 0, found.std_error, 1e-5 * expected)
    z = ((found.frobenius - expected) / errors)[upper]
    assert np.abs(z).max() < 5
    assert found.off_diagonal_ratio_std_error is not None
    assert found.off_diagonal_ratio is not None
    off = ~np.eye(len(expected), dtype=bool)
    ratio = expected[off].mean() / np.diagonal(expected).mean()
    assert abs(found.off_diagonal_ratio - ratio) < 4 * found.off_diagonal_ratio_std_error


def test_the_matrix_and_the_densities_are_exact_where_n_is_small():
    given, hessian = reference("convolution")
    found = block_structure(
        given.module, given.loss_fn, given.batches, densities=True, return_matrix=True
    )
    assert found.matrix is not None
    assert found.densities is not None
    np.testing.assert_allclose(found.matrix, hessian, atol=1e-6)
    assert found.num_hvps == len(hessian)  # the densities come from the matrix
    start = 0
    for size, density in zip(found.sizes, found.densities, strict=True):
        block = hessian[start : start + size, start : start + size]
        np.testing.assert_allclose(density.nodes, torch.linalg.eigvalsh(block), atol=1e-6)
        start += size
    _, rows, _ = transformed_densities(found.densities)
    assert found.heterogeneity is not None
    assert found.heterogeneity[0, 1] == pytest.approx(jensenshannon(*rows, base=2), abs=1e-6)
    assert found.mean_heterogeneity == pytest.approx(found.heterogeneity[0, 1])


def wide() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Too large for the exact path by default."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 5)
    )
    return net, [(torch.randn(16, 20), torch.randint(5, (16,))) for _ in range(2)]


def test_probed_densities_have_the_moments_of_the_blocks():
    net, batches = wide()
    found = block_structure(net, cross_entropy, batches, densities=True, density_probes=20,
                            rel_error=0.02)  # fmt: skip
    exact = block_structure(net, cross_entropy, batches, densities=True, return_matrix=True)
    assert found.densities is not None
    assert exact.densities is not None
    for rough, fine, norm in zip(
        found.densities, exact.densities, np.diagonal(exact.frobenius), strict=True
    ):
        assert fine.moment(2) * fine.size == pytest.approx(norm**2, rel=1e-5)
        assert rough.moment(2) * rough.size == pytest.approx(norm**2, rel=0.4)
        assert rough.nodes.max() == pytest.approx(fine.nodes.max(), rel=1e-3)
    assert found.mean_heterogeneity == pytest.approx(exact.mean_heterogeneity, abs=0.1)


def test_bounds_hold_and_the_norms_come_first():
    net, batches = wide()
    sizes = partition(net, "layer").sizes
    least = least_products(sizes)
    for bound in (least, least + 29, least + 30, 400):
        found = block_structure(
            net, cross_entropy, batches, exact=False, densities=True, budget=Budget(products=bound)
        )
        assert found.num_hvps <= bound
        enough = bound - least >= 10 * len(sizes)
        assert (found.densities is not None) == enough
        assert (found.mean_heterogeneity is not None) == enough
    with pytest.raises(ValueError, match="products are the least for 3 blocks"):
        block_structure(net, cross_entropy, batches, budget=Budget(products=5))


def test_time_up():
    net, batches = wide()
    with pytest.raises(MeasurementError, match="time was up"):
        block_structure(net, cross_entropy, batches, exact=False, budget=Budget(seconds=0))


def test_families_of_two_layers():
    given, hessian = reference("mlp")
    found = block_structure(given.module, given.loss_fn, given.batches, blocks="neuron", exact=True)
    w = torch.arange(len(hessian)) < 36
    squared = hessian.square()
    total = float(squared.sum())
    assert list(found.families) == [("0", "0"), ("0", "2"), ("2", "2")]
    ww, wv, vv = found.families.values()
    assert ww == pytest.approx(float(squared[w][:, w].sum()) / total, rel=1e-5)
    assert wv == pytest.approx(2 * float(squared[w][:, ~w].sum()) / total, rel=1e-5)
    assert ww + wv + vv == pytest.approx(1)
    inside = found.frobenius[:6, :6]
    expected = inside[~np.eye(6, dtype=bool)].mean() / np.diagonal(inside).mean()
    assert found.group_ratio("0") == pytest.approx(expected)
    with pytest.raises(ValueError, match="no group '1'; the groups are 0, 2"):
        found.group_ratio("1")


def half_squared_distance(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = net(batch[0])
    return (outputs - nn.functional.one_hot(batch[1], outputs.shape[1])).square().sum(1).mean() / 2


def test_no_class_meets_another_under_the_squared_error():
    """HBS case 3: H_vv is exactly block-diagonal, so rounding must not make a ratio of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 7, bias=False))
    batch = (torch.randn(30, 5), torch.arange(30) % 7)
    found = block_structure(net, half_squared_distance, [batch], blocks="neuron")
    assert found.group_ratio("2") == 0.0
    assert found.group_ratio("0") > 0
    classes = block_structure(net, half_squared_distance, [batch], blocks="class")
    assert classes.off_diagonal_ratio == classes.off_diagonal_ratio_std_error == 0.0


def test_no_shares_of_a_hessian_that_is_zero():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)  # no neuron is active
    batch = (torch.randn(8, 3), torch.arange(8) % 2)
    found = block_structure(net, half_squared_distance, [batch], blocks="neuron")
    assert not found.frobenius.any()
    assert found.families == {}
    assert found.group_ratio("0") is None
    assert not [name for name in block_scalars(found) if "share" in name or "ratio" in name]


def test_ratios_are_by_row():
    given, _ = reference("convolution")
    found = block_structure(given.module, given.loss_fn, given.batches)
    norms = found.frobenius
    np.testing.assert_allclose(found.ratios, [[1, norms[0, 1] / norms[0, 0]],
                                              [norms[0, 1] / norms[1, 1], 1]])  # fmt: skip


def test_one_layer_has_a_norm_but_no_ratio():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    found = block_structure(nn.Linear(4, 3), cross_entropy, batches, densities=True)
    assert found.names == ("Linear",)
    assert found.off_diagonal_ratio is None
    assert found.mean_heterogeneity is None
    assert found.off_diagonal_share == 0


def test_ragged_batches_count_by_their_samples():
    """One batch of all samples has the same blocks."""
    given, _ = reference("mlp")
    parts = block_structure(given.module, given.loss_fn, given.batches)
    whole = block_structure(given.module, given.loss_fn, [given.whole])
    np.testing.assert_allclose(parts.frobenius, whole.frobenius, rtol=1e-5)
    assert parts.num_samples == whole.num_samples == 10


@pytest.mark.parametrize("name", [*NETWORKS, "layer_norm"])
def test_the_module_is_left_as_it_was(name):
    given = PROBLEMS[name]()
    module = given.module.train()
    module.register_buffer("counter", torch.zeros(3))
    loss = given.loss_fn(module, given.whole)
    loss.backward()
    before = copy.deepcopy(module.state_dict())
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    block_structure(
        module,
        given.loss_fn,
        given.batches[:1] if given.mode == "train" else given.batches,
        exact=False,
        densities=True,
        density_steps=4,
        loss_options=LossOptions(mode=given.mode),
    )
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    after = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))


def test_the_same_seed_gives_the_same_numbers():
    net, batches = wide()
    one, two = (block_structure(net, cross_entropy, batches, exact=False) for _ in range(2))
    assert np.array_equal(one.frobenius, two.frobenius)
    assert one.off_diagonal_ratio == two.off_diagonal_ratio


def test_a_hidden_neuron_that_is_dead_has_an_empty_row():
    """Rows of ReLU neurons that never fire are zero, and divide nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[2] = 0
        net[0].bias[2] = -1
    batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    for exact in (True, False):
        found = block_structure(net, cross_entropy, batches, blocks="neuron", exact=exact,
                                densities=True)  # fmt: skip
        assert not found.frobenius[2].any()
        assert np.isnan(found.ratios[2, 0])
        assert found.off_diagonal_ratio is not None
        assert found.heterogeneity is not None
        assert np.isfinite(found.heterogeneity).all()


def test_the_type_of_blocks_is_public():
    rules: Blocks = [BlockRule("0.*", "hidden"), BlockRule("*", "output")]
    given, _ = reference("mlp")
    found = block_structure(given.module, given.loss_fn, given.batches, blocks=rules)
    assert found.names == ("hidden", "output")


@pytest.mark.slow
def test_a_hundred_blocks_of_lenet_in_300_products():
    """Five seeds each, at initialisation and diverged, against 3000 products.

    Thirty steps at this rate end at a loss of 9, where one class outweighs all other blocks.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    units = {"0": 1, "3": 1, "7": 3, "9": 3, "11": 1}
    rules = [BlockRule(f"{layer}.*", layer, unit) for layer, unit in units.items()]
    images = torch.randn(10, 1, 28, 28).repeat(20, 1, 1, 1) + torch.randn(200, 1, 28, 28)
    batches = [(images, torch.arange(200) % 10)]
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        options = {"blocks": rules, "exact": False, "hvp": "linearize"}
        truth = block_structure(
            net,
            cross_entropy,
            batches,
            rel_error=1e-9,
            seed=99,
            budget=Budget(products=3000),
            **options,
        )
        assert len(truth.names) == 100
        for seed in range(5):
            found = block_structure(
                net, cross_entropy, batches, rel_error=0.1, seed=seed, **options
            )
            assert found.stopped == "converged"
            assert found.num_hvps <= 300
            error = found.off_diagonal_ratio_std_error
            assert error <= 0.1 * found.off_diagonal_ratio
            allowed = 4 * np.hypot(error, truth.off_diagonal_ratio_std_error)
            assert abs(found.off_diagonal_ratio - truth.off_diagonal_ratio) < allowed
        for _ in range(30):
            optimizer.zero_grad()
            cross_entropy(net, batches[0]).backward()
            optimizer.step()

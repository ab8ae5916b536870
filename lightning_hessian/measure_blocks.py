"""The front door without Lightning, second part: the block structure of a Hessian."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hessian.measure import deadline
from lightning_hessian.measure_arguments import RULES, together
from lightning_hessian.operators.data_parallel import hessian_operator
from lightning_hessian.operators.fsdp1 import on_whole_modules
from lightning_hessian.operators.linear import MatrixOperator, SymmetricOperator
from lightning_hessian.operators.memory import memory_explained
from lightning_hessian.probe.objective import LossFunction, Mode
from lightning_hessian.probe.parameters import ParameterSelection
from lightning_hessian.probe.partition import Blocks, partition
from lightning_hessian.probe.sharded import objective_over
from lightning_hessian.results import BlockStructure, SpectralDensity
from lightning_hessian.results.arguments import checked
from lightning_hessian.solvers.block_norms import (
    DENSE_ORDER,
    BlockNorms,
    block_norms,
    least_products,
)
from lightning_hessian.solvers.density import RestrictedOperator, spectral_density
from lightning_hessian.statistics.heterogeneity import heterogeneity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LEAST_STEPS = 10
"""Lanczos steps below which a density says too little to be compared."""


@checked(RULES, together)
@memory_explained
@on_whole_modules
def block_structure(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    blocks: Blocks = "layer",
    parameters: ParameterSelection = None,
    rel_error: float = 0.1,
    exact: bool | None = None,
    densities: bool = False,
    density_steps: int = 30,
    density_probes: int = 2,
    max_hvps: int | None = None,
    max_seconds: float | None = None,
    hvp: str = "auto",
    mode: Mode = "eval",
    batch_weight: Callable[[Any], float] | None = None,
    return_matrix: bool = False,
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    seed: int = 0,
) -> BlockStructure:
    """Returns the Frobenius norms of all blocks of the Hessian, and what follows from them.

    The norms of B blocks take about B + 24 products, or 2 B if that is more, and more until the
    off-diagonal ratio is known to ``rel_error``. Where n is small they take n products and are
    exact. Densities take up to ``density_steps * density_probes`` products for each block. The
    model is left exactly as it was.

    Args:
        model: Any module. Half-precision parameters are measured in float32.
        loss_fn: ``loss_fn(model, batch) -> mean loss``; ``None`` as in `hessian_spectrum`.
        batches: Batches of any structure; read once and held on the model's device.
        blocks: ``"layer"``, ``"neuron"``, ``"class"``, ``"head"``, ``"embedding"``,
            ``"adam_mini"`` (see `partition_rules`), a mapping from names to globs and slices
            (``{"head 0": "attn.weight[0:8, :]"}``), or a list of `BlockRule`.
        parameters: Which parameters, as in `hessian_spectrum`; the others are in no block.
        rel_error: Wanted standard error of the off-diagonal ratio, relative to it.
        exact: Compute all columns (True), none that can be probed (False), or choose (None).
        densities: Whether to estimate the spectral density of every diagonal block too, and from
            them the heterogeneity.
        density_steps: Lanczos steps for each, at most; fewer where ``max_hvps`` asks for it.
        density_probes: Probes for each, at most.
        max_hvps: Bound on Hessian-vector products. The least probes come first, then 10 steps for
            each density, then more probes, then more steps. Densities that do not fit are left
            out, all of them.
        max_seconds: After so many seconds the measurement ends with what is complete.
        hvp: Engine: ``"auto"``, ``"linearize"``, ``"autograd"`` or ``"recompute"``.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        batch_weight: ``batch_weight(batch) -> float``, what the batch's loss is a mean over.
        return_matrix: Whether to return the Hessian itself, [n, n]; takes n products.
        process_group: Processes that make the measurement together, as in `hessian_spectrum`.
        on_progress: ``on_progress(num_hvps, None)``, called after every product.
        seed: Of everything random here.

    Raises:
        ValueError: A partition that does not fit the model, no batches, a bound too small, an
            unknown engine.
        MeasurementError: NaN or infinite loss, a loss that cannot be differentiated twice, or
            time was up before the norms were known.

    Source: HBS.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator ...>
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> batches = [(torch.randn(32, 4), torch.randint(2, (32,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> blocks = block_structure(model, loss_fn, batches, blocks="layer")
        >>> blocks.names, blocks.frobenius.shape, blocks.exact
        (('0', '2'), (2, 2), True)
    """
    start = time.monotonic()
    cut = partition(model, blocks, parameters)
    objective = objective_over(
        process_group, model, loss_fn, batches, cut.space, batch_weight=batch_weight, mode=mode,
        seed=seed,
    )  # fmt: skip
    ranks = objective.ranks
    should_stop = deadline(start, max_seconds)
    with objective.isolated():
        loss = objective.value()
        operator = hessian_operator(objective, hvp, expected_products=2 * least_products(cut.sizes))
        if on_progress is not None:
            operator.on_product = lambda count: on_progress(count, None)
        norms = block_norms(
            operator, cut.labels, rel_error=rel_error, exact=exact,
            max_products=_bound_of_norms(cut.sizes, max_hvps, densities),
            return_matrix=return_matrix, seed=seed, should_stop=should_stop,
        )  # fmt: skip
        spectra = None
        if densities:
            left = None if max_hvps is None else max_hvps - norms.num_products
            spectra = _densities(
                _diagonal_blocks(operator, cut.labels, norms), density_steps, density_probes,
                left, seed + 1, ranks.stopping(should_stop),
            )  # fmt: skip
    return BlockStructure(
        names=cut.names,
        groups=cut.groups,
        sizes=cut.sizes,
        frobenius=norms.frobenius,
        std_error=norms.std_error,
        off_diagonal_ratio=norms.ratio,
        off_diagonal_ratio_std_error=norms.ratio_std_error,
        off_diagonal_share=norms.share,
        off_diagonal_share_std_error=norms.share_std_error,
        exact=bool(norms.exact.all()),
        stopped=norms.stopped,
        densities=spectra,
        heterogeneity=heterogeneity(spectra) if spectra else None,
        loss=loss,
        num_samples=objective.num_samples,
        num_hvps=operator.num_products,
        seconds=time.monotonic() - start,
        engine=operator.engine,
        dtype=str(cut.space.dtype).removeprefix("torch."),
        matrix=norms.matrix.double().numpy()
        if return_matrix and norms.matrix is not None
        else None,
    )


def _bound_of_norms(sizes: Sequence[int], max_hvps: int | None, densities: bool) -> int | None:
    """Returns what the norms may take, so that the densities fit where they can."""
    if max_hvps is None or not densities or sum(sizes) <= DENSE_ORDER:
        return max_hvps
    left = max_hvps - sum(min(size, _LEAST_STEPS) for size in sizes)
    return left if left >= least_products(sizes) else max_hvps


def _diagonal_blocks(
    operator: SymmetricOperator, labels: torch.Tensor, norms: BlockNorms
) -> list[SymmetricOperator]:
    """Returns the diagonal blocks as operators, which cost no product where H is known."""
    count = len(norms.frobenius)
    if norms.matrix is None:
        members = [(labels == block).nonzero().flatten() for block in range(count)]
        return [RestrictedOperator(operator, coordinates) for coordinates in members]
    sizes = torch.bincount(labels[labels >= 0], minlength=count).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        MatrixOperator(norms.matrix[end - size : end, end - size : end])
        for end, size in zip(ends, sizes, strict=True)
    ]


def _densities(
    diagonal: Sequence[SymmetricOperator],
    num_steps: int,
    num_probes: int,
    max_products: int | None,
    seed: int,
    should_stop: Callable[[], bool] | None,
) -> tuple[SpectralDensity, ...] | None:
    """Returns the density of each block, None where the bounds do not allow all of them."""
    known = all(isinstance(block, MatrixOperator) for block in diagonal)
    sizes = [block.size for block in diagonal]
    if known:
        num_steps, num_probes = max(sizes), 1  # all eigenvalues, from the matrix
    elif max_products is not None:
        fitting = _fitting(sizes, num_steps, num_probes, max_products)
        if fitting is None:
            return None
        num_steps, num_probes = fitting
    found = []
    for i, block in enumerate(diagonal):
        density = spectral_density(
            block, num_steps=num_steps, num_probes=num_probes, seed=seed + i,
            should_stop=should_stop,
        )  # fmt: skip
        late = should_stop is not None and i + 1 < len(diagonal) and should_stop()
        if density is None or late:
            return None
        found.append(density)
    return tuple(found)


def _fitting(
    sizes: Sequence[int], num_steps: int, num_probes: int, max_products: int
) -> tuple[int, int] | None:
    """Returns how many steps and probes fit the bound: first fewer probes, then fewer steps."""
    choices = [(num_steps, probes) for probes in range(num_probes, 0, -1)]
    choices += [(steps, 1) for steps in range(num_steps - 1, _LEAST_STEPS - 1, -1)]
    for steps, probes in choices:
        if sum(min(size, steps * probes) for size in sizes) <= max_products:
            return steps, probes
    return None

"""The block structure of a Hessian: norms of all blocks, and densities of the diagonal ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.linear.memory import memory_explained
from lightning_hessian.linear.operator import MatrixOperator, RestrictedOperator, SymmetricOperator
from lightning_hessian.measure.arguments import RULES, bridge, made_from, together
from lightning_hessian.measure.budget import UNLIMITED, Budget
from lightning_hessian.measure.instrument import Absent
from lightning_hessian.measure.options import LossOptions, Matrix
from lightning_hessian.measure.session import Session
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.parameters import ParameterSelection
from lightning_hessian.probe.partition import Blocks, Partition, partition
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.results import BlockStructure, MeasurementError, SpectralDensity
from lightning_hessian.results.arguments import check_fields, checked
from lightning_hessian.solvers.block_norms import (
    DENSE_ORDER,
    BlockNorms,
    block_norms,
    least_products,
)
from lightning_hessian.solvers.density import spectral_density
from lightning_hessian.statistics.heterogeneity import heterogeneity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SHARE = 0.17
"""Beside a spectrum, so many products as a share of it: 15 % of the whole."""
_SHARE_WITH_DENSITIES = 1.5
"""The same where the densities of blocks are wanted."""
_LEAST_STEPS = 10
"""Lanczos steps below which a density says too little to be compared."""


@checked(RULES, together, bridge)
@memory_explained
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
    budget: Budget | None = None,
    hvp: str = "auto",
    matrix: Matrix = "hessian",
    loss_options: LossOptions | None = None,
    return_matrix: bool = False,
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    seed: int = 0,
) -> BlockStructure:
    """Return the Frobenius norms of all blocks of the Hessian, and what follows from them.

    The norms of B blocks take about B + 24 products, or 2 B if that is more, and more until the
    off-diagonal ratio is known to ``rel_error``. Where n is small they take n products and are
    exact. Densities take up to ``density_steps * density_probes`` products for each block. The
    model is left exactly as it was.

    Args:
        model: Any module. Half-precision parameters are measured in float32.
        loss_fn: ``loss_fn(model, batch) -> mean loss``, a criterion, or ``None``, as in
            `hessian_spectrum`.
        batches: Batches of any structure; read once and held on the model's device.
        blocks: ``"layer"``, ``"neuron"``, ``"class"``, ``"head"``, ``"embedding"``,
            ``"adam_mini"`` (see `partition_rules`), a mapping from names to globs and slices
            (``{"head 0": "attn.weight[0:8, :]"}``), or a list of `BlockRule`.
        parameters: Which parameters, as in `hessian_spectrum`; the others are in no block.
        rel_error: Wanted standard error of the off-diagonal ratio, relative to it.
        exact: Compute all columns (True), none that can be probed (False), or choose (None).
        densities: Whether to estimate the spectral density of every diagonal block too, and from
            them the heterogeneity.
        density_steps: Lanczos steps for each, at most; fewer where the budget asks for it.
        density_probes: Probes for each, at most.
        budget: Bounds on Hessian-vector products and seconds. The least probes come first, then 10
            steps for each density, then more probes, then more steps. Densities that do not fit
            are left out, all of them. When time is up, what is complete is returned.
        hvp: Engine: ``"auto"``, ``"linearize"``, ``"autograd"`` or ``"recompute"``.
        matrix: ``"hessian"`` or ``"gauss_newton"``, as in `hessian_spectrum`.
        loss_options: As in `hessian_spectrum`.
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
    given = locals()
    instrument = made_from(BlocksInstrument, given)
    with whole(model) as plain:
        least = least_products(partition(plain, blocks, parameters).sizes)
        with made_from(Session, given, model=plain, expected_products=2 * least) as session:
            allowance = (budget or UNLIMITED).open(session, on_progress)
            return instrument.structure(session, allowance)


@dataclass(frozen=True)
class BlocksRecord:
    """A block structure as it is logged."""

    structure: BlockStructure
    missing: tuple[str, ...] = ()  # sentences on what was left out
    cut_by: Blocks = "layer"  # the partition, which says what the groups of blocks are

    def scalars(self) -> dict[str, float]:
        """Return the statistics by logged name."""
        from lightning_hessian.tracking.scalars import block_scalars

        return block_scalars(self.structure, self.cut_by)

    def absent(self) -> tuple[str, ...]:
        """Return a sentence for each statistic that is missing."""
        return self.missing


@dataclass(frozen=True)
class BlocksInstrument:
    """Norms of the Hessian's blocks, and the heterogeneity of the diagonal ones where affordable.

    Arguments as in `block_structure`.

    Example:
        >>> from lightning_hessian import HessianSpectrumCallback
        >>> by_class = BlocksInstrument(blocks="class", parameters="head.*", densities=True)
        >>> callback = HessianSpectrumCallback(instruments=[by_class])
    """

    blocks: Blocks = "layer"
    parameters: ParameterSelection = None
    rel_error: float = 0.1
    exact: bool | None = None
    densities: bool = False
    density_steps: int = 30
    density_probes: int = 2
    return_matrix: bool = False
    name: str = field(default="blocks", init=False)
    prefix: str = field(default="hessian", init=False)

    def __post_init__(self) -> None:
        check_fields(self, {one.name: RULES[one.name] for one in fields(self) if one.init})

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where the partition does not fit the model."""
        partition(model, self.blocks, self.parameters)

    @property
    def share(self) -> float:
        """Products beside a spectrum, at most, as a share of those of the spectrum."""
        return _SHARE_WITH_DENSITIES if self.densities else _SHARE

    def cost(self, session: Session) -> int:
        """Return the least products that the norms take."""
        return least_products(self._cut(session).sizes)

    def measure(self, session: Session, allowance: Allowance) -> BlocksRecord | Absent:
        """Return the norms of the blocks, or why there are none."""
        cut = self._cut(session)
        least, left = least_products(cut.sizes), allowance.products_left
        if len(cut.sizes) < 2:
            return Absent(
                (
                    f"There are no block statistics: blocks={self.blocks!r} makes a single block, "
                    "with nothing off the diagonal. Cut finer (blocks='neuron'), or give "
                    "blocks=None.",
                )
            )
        if left is not None and left < least:
            return Absent(
                (
                    f"No block statistics: {len(cut.sizes)} blocks take at least {least} products, "
                    f"and the spectrum left {left}. Raise the budget, or give blocks=None.",
                )
            )
        if not allowance.affords(least):
            return Absent(
                ("No block statistics: the spectrum took all the time. Allow more, or fewer K.",)
            )
        order, spent = sum(cut.sizes), allowance.spent
        # A small part of the whole, or about as much again with densities, which somebody asked
        # for; all columns of a tiny network cost next to nothing.
        enough = max(round(self.share * spent), least, order if order <= DENSE_ORDER else 0)
        limit = allowance.limited_to(enough) if spent else nullcontext()
        try:
            with limit:
                found = self.structure(session, allowance)
        except MeasurementError as error:
            if not allowance.is_over():
                raise
            return Absent((f"No block statistics: {error}",))
        missing: tuple[str, ...] = ()
        if self.densities and found.heterogeneity is None:
            missing = (
                f"block_heterogeneity is left out: the densities of {len(cut.sizes)} blocks take "
                f"at least {10 * len(cut.sizes)} products more than the budget allows. Raise it, "
                "or cut fewer blocks.",
            )
        return BlocksRecord(found, missing, self.blocks)

    def structure(self, session: Session, allowance: Allowance) -> BlockStructure:
        """Return the block structure of the session's matrix.

        Raises:
            MeasurementError: Time was up before the norms were known.
        """
        begun, before = time.monotonic(), allowance.spent
        cut = self._cut(session)
        operator = session.operator(cut.space.names)
        norms = block_norms(
            operator,
            cut.labels,
            rel_error=self.rel_error,
            exact=self.exact,
            max_products=_bound_of_norms(cut.sizes, allowance.products_left, self.densities),
            return_matrix=self.return_matrix,
            seed=session.seed,
            allowance=allowance,
        )
        spectra = None
        if self.densities:
            spectra = _densities(
                _diagonal_blocks(operator, session, cut, norms),
                self.density_steps,
                self.density_probes,
                session.seed + 1,
                allowance,
            )
        matrix = norms.matrix if self.return_matrix else None
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
            loss=session.loss,
            num_samples=session.objective.num_samples,
            num_hvps=allowance.spent - before,
            seconds=time.monotonic() - begun,
            engine=operator.engine,
            dtype=str(cut.space.dtype).removeprefix("torch."),
            matrix=None if matrix is None else matrix.double().numpy(),
            matrix_kind=session.matrix,
        )

    def _cut(self, session: Session) -> Partition:
        return partition(session.model, self.blocks, self.parameters)


def _bound_of_norms(sizes: Sequence[int], max_hvps: int | None, densities: bool) -> int | None:
    """Return what the norms may take, so that the densities fit where they can."""
    if max_hvps is None or not densities or sum(sizes) <= DENSE_ORDER:
        return max_hvps
    left = max_hvps - sum(min(size, _LEAST_STEPS) for size in sizes)
    return left if left >= least_products(sizes) else max_hvps


def _diagonal_blocks(
    operator: SymmetricOperator, session: Session, cut: Partition, norms: BlockNorms
) -> list[SymmetricOperator]:
    """Return the diagonal blocks as operators, which cost no product where H is known."""
    labels, count = cut.labels, len(norms.frobenius)
    if norms.matrix is None:
        return [_diagonal_block(operator, session, cut, block) for block in range(count)]
    sizes = torch.bincount(labels[labels >= 0], minlength=count).tolist()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [
        MatrixOperator(norms.matrix[end - size : end, end - size : end])
        for end, size in zip(ends, sizes, strict=True)
    ]


def _diagonal_block(
    operator: SymmetricOperator, session: Session, cut: Partition, block: int
) -> SymmetricOperator:
    """Return a diagonal block: of whole parameter tensors as a view that differentiates by these.

    Such a view costs what its layer costs; the restriction of a product of the whole costs the
    whole.
    """
    coordinates = (cut.labels == block).nonzero().flatten()
    names = _whole_tensors(cut, block)
    if names is not None:
        found: SymmetricOperator = session.operator(names)
        return found
    return RestrictedOperator(operator, coordinates)


def _whole_tensors(cut: Partition, block: int) -> tuple[str, ...] | None:
    """Return the names of the tensors that a block consists of, None where it cuts one."""
    names = []
    for name, labels in zip(cut.space.names, torch.split(cut.labels, cut.space.sizes), strict=True):
        inside = labels == block
        if bool(inside.all()):
            names.append(name)
        elif bool(inside.any()):
            return None
    return tuple(names)


def _densities(
    diagonal: Sequence[SymmetricOperator],
    num_steps: int,
    num_probes: int,
    seed: int,
    allowance: Allowance,
) -> tuple[SpectralDensity, ...] | None:
    """Return the density of each block, None where the bounds do not allow all of them."""
    known = all(isinstance(block, MatrixOperator) for block in diagonal)
    sizes = [block.size for block in diagonal]
    if known:
        num_steps, num_probes = max(sizes), 1  # all eigenvalues, from the matrix
    elif allowance.products_left is not None:
        fitting = _fitting(sizes, num_steps, num_probes, allowance.products_left)
        if fitting is None:
            return None
        num_steps, num_probes = fitting
    found = []
    for i, block in enumerate(diagonal):
        density = spectral_density(
            block, num_steps=num_steps, num_probes=num_probes, seed=seed + i, allowance=allowance
        )
        late = i + 1 < len(diagonal) and allowance.is_over()
        if density is None or late:
            return None
        found.append(density)
    return tuple(found)


def _fitting(
    sizes: Sequence[int], num_steps: int, num_probes: int, max_products: int
) -> tuple[int, int] | None:
    """Return how many steps and probes fit the bound: first fewer probes, then fewer steps."""
    choices = [(num_steps, probes) for probes in range(num_probes, 0, -1)]
    choices += [(steps, 1) for steps in range(num_steps - 1, _LEAST_STEPS - 1, -1)]
    for steps, probes in choices:
        if sum(min(size, steps * probes) for size in sizes) <= max_products:
            return steps, probes
    return None

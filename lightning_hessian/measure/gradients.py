"""The structure of stochastic gradients: spectra and tests of the gradients of T mini-batches."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.isolation.context import isolated
from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.linear.memory import free_bytes, memory_explained
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.measure.arguments import GRADIENT_RULES, bridge, made_from, together
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.gradient_checks import (
    check_alike,
    check_count,
    check_enough,
    check_momentum,
    check_number,
    check_space,
    gram_bytes,
    too_many,
)
from lightning_hessian.measure.gradient_noise import noise_of_passes
from lightning_hessian.measure.gradient_tests import entry_tests
from lightning_hessian.measure.session import Session
from lightning_hessian.operators.gradients.gram import combinations, gram_matrix, spectra
from lightning_hessian.operators.gradients.history import GradientHistory
from lightning_hessian.operators.gradients.momentum import apply_momentum, weights_of_gradients
from lightning_hessian.operators.gradients.ranks import DealtGradients
from lightning_hessian.operators.gradients.rows import (
    GradientRows,
    MiniBatchGradients,
    adam_preconditioner,
)
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.minibatches import MiniBatches, draw_minibatches
from lightning_hessian.probe.objective import Mode
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.results import FloatArray, GradientStructure, MeasurementError, NoiseScale
from lightning_hessian.results.arguments import check_fields, checked, optional
from lightning_hessian.results.path_arguments import existing_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@checked(GRADIENT_RULES, together, bridge)
@memory_explained
def gradient_structure(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    num_gradients: int | None = None,
    batch_size: int | None = None,
    num_eigenvalues: int = 1000,
    parameters: ParameterSelection = None,
    tests: bool = True,
    max_tested: int | None = None,
    clip_norm: float | None = None,
    preconditioner: str | None = None,
    momentum: float = 0.0,
    num_eigenvectors: int = 0,
    mode: Mode = "eval",
    significance: float = 0.05,
    memory_budget: float | None = None,
    directory: str | Path | None = None,
    budget: Budget | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    process_group: ProcessGroup | None = None,
    seed: int = 0,
) -> GradientStructure:
    """Return spectra and tests of the gradients of T mini-batches at the present parameters.

    T gradients give all non-zero eigenvalues of their second moment and covariance exactly, from
    the T x T matrix of their inner products. The model is left exactly as it was: parameters,
    buffers, ``.grad``, random number generators, modes and global flags.

    Args:
        model: Any module. Half-precision parameters are measured in float32.
        loss_fn: ``loss_fn(model, batch) -> mean loss``, a criterion, or ``None``, as in
            `hessian_spectrum`.
        data: A DataLoader, a map-style Dataset, or batches, from which T mini-batches of B
            samples are drawn in shuffled passes; see `probe.minibatches.draw_minibatches`.
        num_gradients: T; by default as many as one pass over the data makes.
        batch_size: B; by default the loader's, or the size of the first batch. 1 for per-sample
            gradients.
        num_eigenvalues: K, how many of the largest eigenvalues; fewer where T - 1 or n is smaller.
        parameters: Which parameters, as in `hessian_spectrum`.
        tests: Whether to test the entries of the gradients, over dimensions and over iterations.
            This takes G whole, 4 T n bytes in memory or in a file; spectra alone do not.
        max_tested: Test at most so many gradients, and so many parameters, drawn at random.
        clip_norm: Scale gradients of a larger norm down to it.
        preconditioner: ``"adam"`` multiplies each gradient by ``1 / (sqrt(v) + 1e-8)``, where v
            is the mean of the T squared (clipped) gradients.
        momentum: beta of SGD, at least 0 and below 1. In the place of each (clipped) gradient
            stands the buffer ``m_t = momentum m_{t-1} + g_t`` of `torch.optim.SGD` after
            mini-batch t, ``m_1 = g_1``. Not together with a preconditioner.
        num_eigenvectors: How many eigenvectors of the covariance to return.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        significance: Level of the tests.
        memory_budget: Bytes that gradients and Gram matrix may take at a time on each rank, by
            default half of what is free. Above it, G lies in a file; without tests, gradients are
            computed anew.
        directory: Where that file lies; by default the system's folder for temporary files.
        budget: Its seconds: after so many no further gradients are computed.
        on_progress: ``on_progress(num_gradients, None)``, called now and then with the number of
            gradients computed so far.
        process_group: As in `hessian_spectrum`. Mini-batches are dealt out to the processes, and
            each holds a slice of the parameters of G.
        seed: Of everything random here.

    Raises:
        ValueError: A parameter selection without match, data that do not make T mini-batches,
            fewer than 2 gradients (20 with tests), an unknown mode or preconditioner, a
            preconditioner and momentum at once.
        MeasurementError: A gradient that is NaN or infinite, a loss without gradient, too little
            memory, or time was up at once. Where a rank failed all raise it, as a `RankError`.

    Source: SG, sections 2 to 4.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator ...>
        >>> model = nn.Linear(9, 3)
        >>> data = [(torch.randn(256, 9), torch.randint(3, (256,)))]
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> found = gradient_structure(model, loss_fn, data, batch_size=8, num_gradients=100)
        >>> found.num_gradients, found.num_parameters, len(found.covariance)
        (100, 30, 30)
    """
    given = locals()
    with whole(model) as plain:
        ranks = Ranks.of(process_group, next(plain.parameters()).device)
        with ranks.together():  # a folder may be missing on one machine only
            instrument = made_from(GradientsInstrument, given)
            instrument.check(plain)
        seconds = None if budget is None else budget.seconds
        allowance = Allowance(seconds=seconds, ranks=ranks, on_progress=on_progress)
        return instrument.structure(plain, loss_fn, data, allowance, ranks, seed)


@dataclass(frozen=True)
class GradientsRecord:
    """A gradient structure as it is logged."""

    structure: GradientStructure
    significance: float = 0.05  # level of the Kolmogorov-Smirnov test

    def scalars(self) -> dict[str, float]:
        """Return the statistics by logged name."""
        return self._found[0]

    def absent(self) -> list[str]:
        """Return a sentence for each statistic that is missing."""
        return self._found[1]

    @property
    def _found(self) -> tuple[dict[str, float], list[str]]:
        from lightning_hessian.tracking.scalars import gradient_scalars

        return gradient_scalars(self.structure, self.significance)


@dataclass(frozen=True)
class GradientsInstrument:
    """Spectra and tests of stochastic gradients; arguments as in `gradient_structure`.

    Example:
        Beside the Hessian, in its session:

        >>> from lightning_hessian import HessianSpectrumCallback
        >>> adam = GradientsInstrument(num_gradients=200, preconditioner="adam", tests=False)
        >>> callback = HessianSpectrumCallback(instruments=[adam])
    """

    num_gradients: int | None = None
    batch_size: int | None = None
    num_eigenvalues: int = 1000
    parameters: ParameterSelection = None
    tests: bool = True
    max_tested: int | None = None
    clip_norm: float | None = None
    preconditioner: str | None = None
    momentum: float = 0.0
    num_eigenvectors: int = 0
    mode: Mode = "eval"
    significance: float = 0.05
    memory_budget: float | None = None
    directory: str | Path | None = None
    name: str = field(default="gradients", init=False)
    prefix: str = field(default="gradient", init=False)

    def __post_init__(self) -> None:
        table = {**GRADIENT_RULES, "directory": optional(existing_folder, "the system's folder")}
        check_fields(self, {one.name: table[one.name] for one in fields(self) if one.init})
        check_momentum(self.momentum, self.preconditioner)
        if self.num_gradients is not None:
            check_number(self.num_gradients, self.tests, self.memory_budget)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError where parameters lie in shards, or are too few for the tests."""
        check_space(ParameterSpace.select(model, self.parameters), self.tests)

    def cost(self, session: Session) -> int:
        """Return about how many gradients are computed; each costs less than a product."""
        return self.num_gradients or len(list(session.batches))

    def measure(self, session: Session, allowance: Allowance) -> GradientsRecord:
        """Return the structure of the gradients of mini-batches of the session's batches."""
        found = self.structure(
            session.model, session.loss_fn, session.batches, allowance, session.ranks, session.seed
        )
        return GradientsRecord(found, self.significance)

    def structure(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        data: Any,
        allowance: Allowance,
        ranks: Ranks,
        seed: int,
    ) -> GradientStructure:
        """Return the structure of the gradients; see `gradient_structure` for the errors."""
        start = time.monotonic()
        space = ParameterSpace.select(model, self.parameters)
        if self.num_gradients is not None:  # before so many are drawn
            _left_by_gram(self.memory_budget, self.num_gradients, space.device, self.tests, ranks)
        minibatches, source = self._drawn(model, loss_fn, data, space, allowance, ranks, seed)
        gradients: GradientRows
        if ranks.world == 1 and source is not None:
            gradients = source
        else:
            gradients = DealtGradients(source, minibatches.total, space, ranks)
        budget = _left_by_gram(
            self.memory_budget, gradients.num_gradients, gradients.device, self.tests, ranks
        )
        with (
            isolated(model, training=self.mode == "train") if source is None else source.isolated()
        ):
            if self.tests:
                gradients = GradientHistory.collect(
                    gradients, memory_budget=budget, directory=self.directory, allowance=allowance
                )
            if self.preconditioner is not None:
                _precondition(gradients)
            gram = gram_matrix(gradients, memory_budget=budget, allowance=allowance)
            count = len(gram)
            check_count(count, minibatches.total, self.tests, ranks)
            noise = self._noise(gram, minibatches, ranks)
            if self.momentum:
                apply_momentum(gradients, gram, self.momentum)
            found = spectra(
                gram, self.num_eigenvalues, space.size, self.num_eigenvectors, ranks=ranks
            )
            del gram
            vectors = None if found.weights is None else self._vectors(gradients, found.weights)
        dimension_tests, iteration_tests = (
            entry_tests(gradients, self.max_tested, self.significance, seed)
            if isinstance(gradients, GradientHistory)
            else (None, None)
        )
        losses, engine, num_computed = _told(source, minibatches.total, ranks)
        return GradientStructure(
            covariance=found.covariance,
            second_moment=found.second_moment,
            covariance_trace=found.covariance_trace,
            second_moment_trace=found.second_moment_trace,
            mean_gradient_norm=found.mean_norm,
            dimension_tests=dimension_tests,
            iteration_tests=iteration_tests,
            loss=float(losses[:count].mean()),
            num_parameters=space.size,
            num_gradients=count,
            batch_size=minibatches.batch_size,
            num_computed=num_computed,
            seconds=time.monotonic() - start,
            engine=engine,
            dtype=str(space.dtype).removeprefix("torch."),
            noise_scale=noise,
            eigenvectors=vectors,
        )

    def _vectors(self, gradients: GradientRows, weights: Tensor) -> Tensor:
        """Return the eigenvectors [k, n] that are combined of the rows by ``weights`` [k, T]."""
        if self.momentum and not isinstance(gradients, GradientHistory):
            weights = weights_of_gradients(weights, self.momentum)
        return combinations(gradients, weights)

    def _noise(self, gram: Tensor, minibatches: MiniBatches, ranks: Ranks) -> NoiseScale:
        """Return the noise scale of the gradients with these inner products [T, T]."""
        if self.clip_norm is not None or self.preconditioner is not None:
            return NoiseScale.absent(
                "gradients that are clipped or preconditioned are no means over samples. Measure "
                "without clip_norm and preconditioner."
            )
        sizes = [size for told in ranks.all_gather_object(minibatches.sizes()) for size in told]
        if None in sizes:
            return NoiseScale.absent(
                "a batch does not tell how many samples it has: its tensors differ in their first "
                "dimension. Give a DataLoader over a Dataset."
            )
        return noise_of_passes(gram, minibatches.per_pass, sizes)

    def _drawn(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        data: Any,
        space: ParameterSpace,
        allowance: Allowance,
        ranks: Ranks,
        seed: int,
    ) -> tuple[MiniBatches, MiniBatchGradients | None]:
        """Return the mini-batches, and the gradients of this rank's share, None without any."""
        with ranks.together():
            minibatches = draw_minibatches(
                data,
                batch_size=self.batch_size,
                num_minibatches=self.num_gradients,
                seed=seed,
                ranks=ranks,
            )
            check_enough(minibatches.total, self.tests)
            source = None
            if len(minibatches):
                source = MiniBatchGradients(
                    model,
                    loss_fn,
                    minibatches,
                    space,
                    mode=self.mode,
                    clip_norm=self.clip_norm,
                    seed=seed,
                )
                source.on_product = allowance.spend
        check_alike(minibatches, space, ranks)
        return minibatches, source


def _left_by_gram(
    memory_budget: float | None,
    num_gradients: int,
    device: torch.device,
    tests: bool,
    ranks: Ranks,
) -> float:
    """Return what the Gram matrix leaves of the budget, at least half, the same on all ranks."""
    if memory_budget is None:
        # G lies in main memory, which all ranks of a machine share, whatever their devices.
        device = torch.device("cpu") if tests else device
        hosts = ranks.all_gather_object(socket.gethostname())
        sharing = hosts.count(hosts[ranks.rank]) if device.type == "cpu" else ranks.neighbours
        memory_budget = free_bytes(device) / 2 / sharing
    memory_budget = ranks.all_reduce_min(memory_budget)
    needed = gram_bytes(num_gradients)
    if 2 * needed > memory_budget:
        raise MeasurementError(too_many(num_gradients, memory_budget))
    return memory_budget - needed


def _precondition(gradients: GradientRows) -> None:
    """Make the gradients those that Adam would step by."""
    if not isinstance(gradients, GradientHistory):  # computed by all ranks, piece by piece
        gradients.precondition(adam_preconditioner(gradients))
        return
    with gradients.shard.ranks.together():
        gradients.precondition(adam_preconditioner(gradients))


def _told(
    source: MiniBatchGradients | None, total: int, ranks: Ranks
) -> tuple[FloatArray, str, int]:
    """Return the losses [T], the engine, and how many gradients were computed, on all ranks."""
    mine = None if source is None else (source.losses, source.engine, source.num_computed)
    losses = np.empty(total)
    engines, computed = [], 0
    for rank, told in enumerate(ranks.all_gather_object(mine)):
        if told is not None:
            losses[rank :: ranks.world] = told[0]
            engines.append(told[1])
            computed += told[2]
    return losses, "+".join(dict.fromkeys(engines)), computed

"""Spectra: the largest eigenvalues of a Hessian, its trace, and its density where asked."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.linear.memory import memory_explained
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.measure.arguments import SPECTRUM_RULES, made_from, together
from lightning_hessian.measure.budget import UNLIMITED, Budget
from lightning_hessian.measure.leading import NUM_LEADING, Leading, kept
from lightning_hessian.measure.options import LossOptions, Matrix, PooledSLQ, SpectrumProtocol
from lightning_hessian.measure.protocols import (
    DEFAULT_EIGENVALUES,
    DEFAULT_POOLED,
    DENSITY_PRODUCTS,
    Top,
    pooled_top,
    ritz_top,
    whole_density,
)
from lightning_hessian.measure.session import Session
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.sharding.objective import ranks_of
from lightning_hessian.results import ArgumentError, HessianSpectrum
from lightning_hessian.results.arguments import check_fields, checked
from lightning_hessian.results.path_arguments import file_to_write
from lightning_hessian.solvers.lanczos import default_basis, default_bound, lanczos
from lightning_hessian.solvers.storage import ANYWHERE, BasisStorage
from lightning_hessian.solvers.trace import TraceEstimate, trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@checked(SPECTRUM_RULES, together)
@memory_explained
def hessian_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    num_eigenvalues: int | None = None,
    parameters: ParameterSelection = None,
    protocol: SpectrumProtocol = "converged",
    tol: float = 1e-3,
    budget: Budget | None = None,
    hvp: str = "auto",
    matrix: Matrix = "hessian",
    loss_options: LossOptions | None = None,
    trace_probes: int = 16,
    density: bool = False,
    return_eigenvectors: bool = False,
    basis: BasisStorage = ANYWHERE,
    checkpoint: str | os.PathLike[str] | None = None,
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    seed: int = 0,
) -> HessianSpectrum:
    """Return the largest eigenvalues of the Hessian of the mean loss, and its trace.

    The Hessian is that of the mean over all samples of all batches. The model is left exactly as
    it was: parameters, buffers, ``.grad``, random number generators, modes and global flags.

    Args:
        model: Any module. Half-precision parameters are measured in float32.
        loss_fn: ``loss_fn(model, batch) -> mean loss`` of the batch, a scalar tensor. ``None``
            for a module with ``hessian_loss(batch)`` or a LightningModule's ``training_step``.
        batches: Batches of any structure; read once and held on the model's device.
        num_eigenvalues: K, how many of the largest (algebraic) eigenvalues; by default 50, or
            1000 under `PooledSLQ`.
        parameters: A glob, a list of globs, a regex or a predicate ``(name, parameter) -> bool``;
            ``None`` for all that require grad.
        protocol: ``"converged"``, or a `PooledSLQ`, the papers' procedure.
        tol: An eigenpair has converged at residual norm <= tol * abs(its Ritz value).
        budget: Bounds on Hessian-vector products (those of the trace included) and seconds. By
            default 40 K + 400 products for the eigenvalues, and no bound on the time. A density
            takes what the others have left. What has converged when time is up is returned.
        hvp: Engine: ``"auto"``, ``"linearize"``, ``"linearize_onednn"``, ``"autograd"``,
            ``"recompute"``, ``"compile"`` or ``"finite_difference"``; see `HessianOperator`.
        matrix: ``"hessian"``, or ``"gauss_newton"`` for J^T H_L J: the curvature of the loss seen
            through the network, positive semi-definite where the loss is convex in the outputs. It
            needs the split between network and loss: torch's own loss functions are recognised,
            others need ``LossOptions(outputs_and_loss=...)``; engines ``"auto"``, ``"autograd"``
            and ``"recompute"``.
        loss_options: How the loss is evaluated: train or evaluation mode, what a batch weighs,
            where the network ends.
        trace_probes: Hutchinson probes for the trace, each one product; 0 for no trace.
        density: Whether to estimate the density of the whole spectrum too, by up to 320 more
            products (stochastic Lanczos quadrature, 4 probes of 80 steps); `PooledSLQ` has it
            for nothing.
        return_eigenvectors: Whether to return the Ritz vectors too, [K, n].
        basis: How much memory the Krylov basis may take, where, and in which precision.
        checkpoint: A file from which an interrupted run goes on, if it exists, and which is
            written every ten minutes and when time or products run out; see `lanczos`. The same
            weights and batches must be given. Not for `PooledSLQ`.
        process_group: Processes that make the measurement together: all make this call with the
            same arguments. Batches are dealt out to them, Krylov vectors lie in shards, and all
            get the same numbers, whatever their number. By default this process measures alone.
        on_progress: ``on_progress(num_hvps, num_converged)``, called after every product with the
            number of products and of eigenvalues known to have converged so far.
        seed: Of everything random here.

    Raises:
        ValueError: A parameter selection without match, K above the number of parameters, no
            batches, a bound below K, an unknown engine.
        MeasurementError: NaN or infinite loss, a loss that cannot be differentiated twice, too
            little memory.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator ...>
        >>> model = torch.nn.Linear(4, 1)
        >>> batches = [(torch.randn(32, 4), torch.randn(32, 1))]
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> spectrum = hessian_spectrum(model, loss_fn, batches, num_eigenvalues=3)
        >>> spectrum.num_converged, spectrum.num_parameters
        (3, 5)
    """
    given = locals()
    instrument = made_from(SpectrumInstrument, given)
    budget = budget or UNLIMITED
    instrument.check_budget(budget)
    with made_from(Session, given, expected_products=instrument.expected_products) as session:
        instrument.check(session.model)
        if checkpoint is not None:
            with session.ranks.together():  # a folder may be missing on one machine only
                file_to_write("checkpoint", checkpoint)
        record = instrument.measure(session, budget.open(session, on_progress))
    warn_caller(record.warnings, session.ranks)
    return record.spectrum


def warn_caller(said: Iterable[str], ranks: Ranks) -> None:
    """Warn the caller of a measuring function, on rank zero."""
    if ranks.rank == 0:
        for warning in said:
            warnings.warn(warning, stacklevel=5)  # past the function and both decorators


@dataclass(frozen=True)
class SpectrumRecord:
    """A spectrum as it is logged, and what is to be said of the measurement."""

    spectrum: HessianSpectrum
    significance: float = 0.05  # level of the Kolmogorov-Smirnov test
    warnings: tuple[str, ...] = ()

    def scalars(self) -> dict[str, float]:
        """Return the statistics by logged name."""
        return self._found[0]

    def absent(self) -> list[str]:
        """Return a sentence for each statistic that is missing."""
        return [*self.warnings, *self._found[1]]

    @cached_property
    def _found(self) -> tuple[dict[str, float], list[str]]:
        from lightning_hessian.tracking.scalars import spectrum_scalars

        return spectrum_scalars(self.spectrum, self.significance)


@dataclass(frozen=True)
class SpectrumInstrument:
    """The top of the Hessian's spectrum, its trace, and its density where asked.

    Arguments as in `hessian_spectrum`, and:

    Attributes:
        significance: Level of the Kolmogorov-Smirnov test.
    """

    num_eigenvalues: int | None = None
    parameters: ParameterSelection = None
    protocol: SpectrumProtocol = "converged"
    tol: float = 1e-3
    trace_probes: int = 16
    density: bool = False
    return_eigenvectors: bool = False
    basis: BasisStorage = ANYWHERE
    checkpoint: str | os.PathLike[str] | None = None
    significance: float = 0.05
    name: str = field(default="spectrum", init=False)
    prefix: str = field(default="hessian", init=False)

    def __post_init__(self) -> None:
        check_fields(self, {one.name: SPECTRUM_RULES[one.name] for one in fields(self) if one.init})

    @property
    def count(self) -> int:
        """K, by default that of the protocol."""
        pooled = isinstance(self.protocol, PooledSLQ)
        if self.checkpoint is not None and pooled:
            remedy = "PooledSLQ keeps no checkpoint; leave checkpoint=None."
            raise ArgumentError("checkpoint", self.checkpoint, remedy)
        return self.num_eigenvalues or (DEFAULT_POOLED if pooled else DEFAULT_EIGENVALUES)

    @property
    def expected_products(self) -> int:
        """About how many products a measurement takes."""
        if isinstance(self.protocol, PooledSLQ):
            return self.protocol.num_runs * self.protocol.num_steps + self.trace_probes
        # Networks took 3 to 4.5 K (K = 50): as many as a basis holds before a restart.
        density = DENSITY_PRODUCTS if self.density else 0
        return default_basis(self.count) + self.trace_probes + density

    def check(self, model: nn.Module) -> None:
        """Raise where the arguments do not fit the model, before anything is measured.

        Raises:
            ValueError: The selection matches nothing, or has fewer than K parameters; or parameters
                are distributed in a way that cannot be measured.
        """
        ranks_of(model, torch.device("cpu"))
        space = ParameterSpace.select(model, self.parameters)
        if self._least > space.size:
            raise ArgumentError(
                "num_eigenvalues",
                self.count,
                f"The {len(space.names)} selected parameter tensors hold {space.size} numbers, so "
                f"H has {space.size} eigenvalues. Ask for 1 to {space.size}.",
            )

    def check_budget(self, budget: Budget) -> None:
        """Raise where the products allowed are too few for K eigenvalues and the trace."""
        if self.trace_probes == 1:
            raise ArgumentError(
                "trace_probes", 1, "One gives no standard error; use 0 or at least 2."
            )
        least = self._least + self.trace_probes
        if budget.products is not None and budget.products < least:
            raise ArgumentError(
                "budget",
                f"Budget(products={budget.products})",
                f"It is too small: {self._least} eigenvalues and {self.trace_probes} trace probes "
                f"take at least {least} products. Raise it, or lower num_eigenvalues.",
            )

    @property
    def _least(self) -> int:
        """How many eigenvalues there must be; pooled ones are as many as they are."""
        return 1 if isinstance(self.protocol, PooledSLQ) else self.count

    def cost(self, session: Session) -> int:
        """Return how many products a measurement takes, about."""
        return min(self.expected_products, default_bound(session.space.size))

    def measure(self, session: Session, allowance: Allowance) -> SpectrumRecord:
        """Return the spectrum of the session's matrix, or of its part by ``parameters``."""
        begun = time.monotonic()
        space = ParameterSpace.select(session.model, self.parameters)
        operator = session.operator(space.names)
        before = allowance.spent
        top = self._top(operator, allowance, session.seed)
        if self.protocol == "converged":
            _lend(session, space.names, operator, top)
        estimate = None
        if self.trace_probes and top.trace is not None:
            estimate = TraceEstimate(top.trace, std_error=0.0, num_products=0)
        elif self.trace_probes:
            estimate = trace(
                operator,
                torch.from_numpy(top.values[: top.good]),
                top.vectors[: top.good],
                num_probes=self.trace_probes,
                seed=session.seed + 1,
                allowance=allowance,
            )
        said = list(top.warnings)
        density = top.density if self.density else None
        if self.density and density is None:
            density = whole_density(operator, allowance, session.seed + 2)
            if density is None:
                said.append(
                    "There is no density of the whole spectrum: the eigenvalues and the trace left "
                    "too little of the budget. Allow more."
                )
        vectors = None
        if self.return_eigenvectors and not isinstance(self.protocol, PooledSLQ):
            vectors = operator.shard.gather(top.vectors.to(space.dtype, copy=True))
        spectrum = HessianSpectrum(
            eigenvalues=top.values,
            residuals=top.residuals,
            converged=top.residuals <= self.tol * abs(top.values),
            trace=estimate.value if estimate else None,
            trace_std_error=estimate.std_error if estimate else None,
            lambda_min=top.lowest,
            loss=session.loss,
            num_parameters=space.size,
            num_samples=session.objective.num_samples,
            num_hvps=max(allowance.spent - before, top.num_products),
            seconds=time.monotonic() - begun,
            engine=operator.engine,
            dtype=str(space.dtype).removeprefix("torch."),
            eigenvectors=vectors,
            protocol="pooled_slq" if isinstance(self.protocol, PooledSLQ) else self.protocol,
            num_runs=self.protocol.num_runs if isinstance(self.protocol, PooledSLQ) else 1,
            num_copies=top.num_copies,
            density=density,
            matrix_kind=session.matrix,
        )
        return SpectrumRecord(spectrum, self.significance, tuple(said))

    def _top(self, operator: Any, allowance: Allowance, seed: int) -> Top:
        """Return the top of the spectrum by the protocol."""
        left = allowance.products_left
        bound = None if left is None else left - self.trace_probes
        if isinstance(self.protocol, PooledSLQ):
            return pooled_top(
                operator, self.count, self.protocol, self.tol, self.basis, bound, allowance, seed
            )
        ritz = lanczos(
            operator,
            self.count,
            tol=self.tol,
            max_products=default_bound(self.count) if bound is None else bound,
            storage=self.basis,
            checkpoint=self.checkpoint,
            seed=seed,
            allowance=allowance,
        )
        return ritz_top(ritz, self.count, self.tol)


def _lend(session: Session, names: tuple[str, ...], operator: Any, top: Top) -> None:
    """Keep the leading eigenvectors for what else is measured in a session of training."""
    if session.training is None or session.matrix != "hessian" or names != session.space.names:
        return
    if top.good:
        vectors = kept(top.vectors[: top.good], NUM_LEADING, operator)
        count = len(vectors)
        session.leading = Leading(
            names=names,
            values=tuple(top.values[:count].tolist()),
            residuals=tuple(top.residuals[:count].tolist()),
            vectors=vectors,
            beyond=float((top.values + top.residuals)[count]) if count < top.good else None,
        )

"""The front door without Lightning: one call from a module and some batches to a record."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hessian.measure_arguments import SPECTRUM_RULES, together
from lightning_hessian.measure_protocols import (
    check_protocol,
    pooled_top,
    ritz_top,
    whole_density,
)
from lightning_hessian.operators.data_parallel import hessian_operator
from lightning_hessian.operators.fsdp1 import on_whole_modules
from lightning_hessian.operators.memory import memory_explained
from lightning_hessian.probe.objective import LossFunction, Mode
from lightning_hessian.probe.parameters import ParameterSelection, ParameterSpace
from lightning_hessian.probe.sharded import objective_over, ranks_of
from lightning_hessian.results import ArgumentError, HessianSpectrum
from lightning_hessian.results.arguments import checked, file_to_write
from lightning_hessian.solvers.lanczos import default_bound, lanczos
from lightning_hessian.solvers.storage import BasisStorage
from lightning_hessian.solvers.trace import TraceEstimate, trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@checked(SPECTRUM_RULES, together)
@memory_explained
@on_whole_modules
def hessian_spectrum(
    model: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    *,
    num_eigenvalues: int | None = None,
    parameters: ParameterSelection = None,
    protocol: str = "converged",
    num_runs: int = 3,
    num_steps: int = 1000,
    tol: float = 1e-3,
    max_hvps: int | None = None,
    max_seconds: float | None = None,
    hvp: str = "auto",
    mode: Mode = "eval",
    batch_weight: Callable[[Any], float] | None = None,
    trace_probes: int = 16,
    density: bool = False,
    return_eigenvectors: bool = False,
    basis_memory: float | None = None,
    basis_storage: str = "auto",
    basis_dtype: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    process_group: ProcessGroup | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    seed: int = 0,
) -> HessianSpectrum:
    """Returns the largest eigenvalues of the Hessian of the mean loss, and its trace.

    The Hessian is that of the mean over all samples of all batches. The model is left exactly as
    it was: parameters, buffers, ``.grad``, random number generators, modes and global flags.

    Args:
        model: Any module. Half-precision parameters are measured in float32.
        loss_fn: ``loss_fn(model, batch) -> mean loss`` of the batch, a scalar tensor. ``None``
            for a module with ``hessian_loss(batch)`` or a LightningModule's ``training_step``.
        batches: Batches of any structure; read once and held on the model's device.
        num_eigenvalues: K, how many of the largest (algebraic) eigenvalues; by default 50, or
            1000 under ``"pooled_slq"``.
        parameters: A glob, a list of globs, a regex or a predicate ``(name, parameter) -> bool``;
            ``None`` for all that require grad.
        protocol: ``"converged"``, or ``"pooled_slq"``, the papers' procedure: Ritz values of
            several Lanczos runs in one list, of which the K largest are kept whether they have
            converged or not. Many are copies of one another (``num_copies``), and power laws are
            fitted to all that are positive, so that this is for comparison with the papers only.
        num_runs: Runs of ``"pooled_slq"``.
        num_steps: Steps of each; no more than there are parameters.
        tol: An eigenpair has converged at residual norm <= tol * abs(its Ritz value).
        max_hvps: Bound on Hessian-vector products, those of the trace included; by default
            40 K + 400 for the eigenvalues. A density takes what the others have left.
        max_seconds: After so many seconds the measurement ends with what has converged.
        hvp: Engine: ``"auto"``, ``"linearize"``, ``"autograd"``, ``"recompute"``, ``"compile"`` or
            ``"finite_difference"``; see `HessianOperator`.
        mode: ``"eval"`` (dropout off, BatchNorm by its running statistics) or ``"train"``.
        batch_weight: ``batch_weight(batch) -> float``, what the batch's loss is a mean over
            (unmasked tokens, say); by default its labels that are not -100, where it holds
            ``labels`` of which some are, else its number of samples (see `probe.batch_weight`).
        trace_probes: Hutchinson probes for the trace, each one product; 0 for no trace.
        density: Whether to estimate the density of the whole spectrum too, by up to 320 more
            products (stochastic Lanczos quadrature, 4 probes of 80 steps); ``"pooled_slq"`` has it
            for nothing.
        return_eigenvectors: Whether to return the Ritz vectors too, [K, n].
        basis_memory: Bytes that the Krylov basis may take in each process, with what its
            projected problem needs on the CPU; by default half of what is free.
        basis_storage: Where it may live: ``"device"``, ``"cpu"``, ``"disk"`` or ``"disk:FOLDER"``,
            or ``"auto"``: the device, and the CPU where the device cannot hold the least.
        basis_dtype: ``"bfloat16"`` halves it; serves for eigenvalues within a decade of the
            largest, see `BasisStorage` for what it costs.
        checkpoint: A file from which an interrupted run goes on, if it exists, and which is
            written every ten minutes and when time or products run out; see `lanczos`. The same
            weights and batches must be given. Not for ``"pooled_slq"``.
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
    start = time.monotonic()
    count = check_protocol(protocol, num_eigenvalues, checkpoint)
    storage = BasisStorage(basis_memory, basis_storage, basis_dtype)
    pooled = protocol == "pooled_slq"
    space = check_selection(model, parameters, 1 if pooled else count)
    probes, bound = split_bound(1 if pooled else count, max_hvps, trace_probes)
    objective = objective_over(
        process_group, model, loss_fn, batches, space, batch_weight=batch_weight, mode=mode,
        seed=seed,
    )  # fmt: skip
    ranks = objective.ranks
    if checkpoint is not None:
        with ranks.together():  # a folder may be missing on one machine only
            file_to_write("checkpoint", checkpoint)
    should_stop = deadline(start, max_seconds)
    num_converged = 0

    def on_check(found: int) -> None:
        nonlocal num_converged
        num_converged = found

    with objective.isolated():
        loss = objective.value()
        expected = num_runs * num_steps if pooled else 3 * count
        operator = hessian_operator(objective, hvp, expected_products=expected + probes)
        if on_progress is not None:
            operator.on_product = lambda done: on_progress(done, num_converged)
        if pooled:
            limit = bound if max_hvps is not None else num_runs * num_steps
            top = pooled_top(operator, count, num_runs, num_steps, tol, limit, storage, seed,
                          should_stop)  # fmt: skip
        else:
            ritz = lanczos(
                operator, count, tol=tol, max_products=bound, seed=seed, storage=storage,
                checkpoint=checkpoint, should_stop=should_stop, on_check=on_check,
            )  # fmt: skip
            top = ritz_top(ritz, count, tol)
        estimate = None
        if probes and top.trace is not None:
            estimate = TraceEstimate(top.trace, std_error=0.0, num_products=0)
        elif probes:
            estimate = trace(
                operator, torch.from_numpy(top.values[: top.good]), top.vectors[: top.good],
                num_probes=probes, seed=seed + 1, should_stop=should_stop,
            )  # fmt: skip
        spent = top.num_products + (estimate.num_products if estimate else 0)
        whole = top.density if density else None
        if density and not pooled:
            left = None if max_hvps is None else max_hvps - spent
            whole = whole_density(operator, left, seed + 2, should_stop)
            spent += whole.num_products if whole else 0
    if ranks.rank == 0:
        for warning in top.warnings:
            warnings.warn(warning, stacklevel=4)  # past both decorators, to the caller
        if density and whole is None:
            warnings.warn(
                "There is no density of the whole spectrum: the eigenvalues and the trace left "
                "too little of max_hvps or of the time. Allow more.",
                stacklevel=4,
            )
    vectors = None
    if return_eigenvectors and not pooled:
        vectors = operator.shard.gather(top.vectors.to(space.dtype, copy=True))
    return HessianSpectrum(
        eigenvalues=top.values,
        residuals=top.residuals,
        converged=top.residuals <= tol * abs(top.values),
        trace=estimate.value if estimate else None,
        trace_std_error=estimate.std_error if estimate else None,
        lambda_min=top.lowest,
        loss=loss,
        num_parameters=space.size,
        num_samples=objective.num_samples,
        num_hvps=max(spent, operator.num_products),
        seconds=time.monotonic() - start,
        engine=operator.engine,
        dtype=str(space.dtype).removeprefix("torch."),
        eigenvectors=vectors,
        protocol=protocol,
        num_runs=num_runs if pooled else 1,
        num_copies=top.num_copies,
        density=whole,
    )


def deadline(start: float, max_seconds: float | None) -> Callable[[], bool] | None:
    """Returns whether time is up, as a question; None where there is no limit."""
    if max_seconds is None:
        return None
    return lambda: time.monotonic() - start > max_seconds


def check_selection(
    model: nn.Module, parameters: ParameterSelection, num_eigenvalues: int
) -> ParameterSpace:
    """Returns the selected parameters, having checked that K eigenvalues can be asked of them.

    Raises:
        ValueError: The selection matches nothing, or has fewer than K parameters; or parameters
            are distributed in a way that cannot be measured.
    """
    ranks_of(model, torch.device("cpu"))
    space = ParameterSpace.select(model, parameters)
    if not 1 <= num_eigenvalues <= space.size:
        raise ArgumentError(
            "num_eigenvalues",
            num_eigenvalues,
            f"The {len(space.names)} selected parameter tensors hold {space.size} numbers, so H "
            f"has {space.size} eigenvalues. Ask for 1 to {space.size}.",
        )
    return space


def split_bound(num_eigenvalues: int, max_hvps: int | None, trace_probes: int) -> tuple[int, int]:
    """Returns how many products go to the trace and how many, at most, to the eigenvalues.

    Raises:
        ValueError: The bound is too small, or a single probe was asked for.
    """
    if trace_probes == 1:
        raise ArgumentError(
            "trace_probes", trace_probes, "One gives no standard error; use 0 or at least 2."
        )
    if max_hvps is None:
        return trace_probes, default_bound(num_eigenvalues)
    if max_hvps < num_eigenvalues + trace_probes:
        raise ArgumentError(
            "max_hvps",
            max_hvps,
            f"It is too small: {num_eigenvalues} eigenvalues and {trace_probes} trace probes take "
            f"at least {num_eigenvalues + trace_probes} products. Raise it, or lower "
            "num_eigenvalues.",
        )
    return trace_probes, max_hvps - trace_probes

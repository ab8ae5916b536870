"""Thick-restart Lanczos: the largest eigenvalues of a symmetric operator, with residuals."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.results.path_arguments import file_to_write, path_name
from lightning_hessian.solvers import checkpoint as checkpoints
from lightning_hessian.solvers.krylov import RitzPairs
from lightning_hessian.solvers.storage import ANYWHERE, BasisStorage, placed
from lightning_hessian.solvers.termination import keeps_state_on_sigterm
from lightning_hessian.solvers.thick_restart import ThickRestart

__all__ = ["RitzPairs", "default_basis", "default_bound", "lanczos"]


def lanczos(
    operator: SymmetricOperator,
    num_eigenvalues: int,
    *,
    tol: float = 1e-3,
    max_products: int | None = None,
    max_basis: int | None = None,
    num_checks: int | None = None,
    storage: BasisStorage = ANYWHERE,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 600,
    seed: int = 0,
    allowance: Allowance = UNBOUNDED,
) -> RitzPairs:
    """Return the K largest (algebraic) eigenvalues of an operator with their residual bounds.

    Lanczos with full reorthogonalisation and thick restart (Wu and Simon 2000). The projected
    problem is solved in float64 on the CPU, by torch's LAPACK: SciPy brings threads of its own,
    which fight torch's for the cores (three times slower steps on two cores).

    A Krylov space holds one vector of each eigenspace, so copies of a repeated eigenvalue appear
    late, by rounding. Therefore K converged pairs are not taken at their word: a search from a new
    random vector follows, and the result is final only if it turns up nothing larger.

    A residual bound adds up the classical Lanczos estimate and the measured departure of the
    products from symmetry and from the recurrence, so that it stays honest where rounding, not
    the number of steps, is the limit.

    Converged vectors stay in the basis through every restart, and new ones are kept orthogonal to
    them: soft locking. Hard locking (their couplings set to zero) was measured on twelve problems
    of order 400 (power law, ten-fold cluster, even spacing; K = 15, m = 25 and 40; float32 and
    float64): at couplings below rounding the same 45 to 321 products, to the last one; at
    couplings below tol as many, with eight runs of twelve no longer shown to have converged.

    Memory: ``max_basis + 2`` vectors, and 4 m^2 numbers in float64 on the CPU. Work in a step: one
    product and 4 m n flops, twice that where orthogonality asks for it; the host waits for the
    device once.

    Args:
        operator: Symmetric operator of order n.
        num_eigenvalues: K, at most n.
        tol: An eigenpair has converged at residual <= tol * abs(Ritz value).
        max_products: Bound on products; by default ``default_bound(K)``.
        max_basis: m, at most so many vectors are held before a restart; by default
            ``default_basis(K)``, or as many as fit the memory that ``storage`` allows.
        num_checks: Steps of the search for missed copies; by default 10, or a twentieth of the
            steps before it if that is more. 0 for no search; more where eigenvalues are known to
            repeat.
        storage: How much memory the basis may take, where, and in which precision.
        checkpoint: A file that holds the state of a run that was interrupted: by the end of its
            time, a bound, an exception, or the end of the process. If it exists, the run goes on
            from there, to the same digits as without the interruption; ``max_products`` counts
            what was spent before. It is written every ``checkpoint_seconds``, when the run is
            interrupted, by SIGTERM too, and deleted when the run is done. Ranks add their number
            to its name.
        checkpoint_seconds: How much work may be lost, at most.
        seed: Of the start vector.
        allowance: Asked after every product whether the time is up, which ends the iteration with
            what there is; told now and then how many of the K have converged.

    Raises:
        ValueError: K is not in 1..n, ``max_basis`` or ``max_products`` is too small for K, or the
            checkpoint is of another run, or damaged, or cannot be written.
        MeasurementError: A product is NaN or infinite, or no basis for K fits the memory.

    Example:
        >>> import torch
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
        >>> lanczos(MatrixOperator(matrix), 2).values.round(6)
        array([8., 7.])
    """
    size = operator.size
    if not 1 <= num_eigenvalues <= size:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues were asked of an operator of order {size}; "
            f"ask for 1 to {size}."
        )
    allowance.note_converged(0)
    if max_products is None:
        max_products = default_bound(num_eigenvalues)
    if max_products < num_eigenvalues:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues need at least as many products; the bound is "
            f"{max_products}. Raise it or ask for fewer eigenvalues."
        )
    room = _room(operator, num_eigenvalues, max_products, max_basis, storage)
    if checkpoint is not None:
        path_name("checkpoint", checkpoint)
    file = None if checkpoint is None else checkpoints.file_of(checkpoint, operator)
    ranks = operator.shard.ranks
    with ranks.together():
        if checkpoint is not None:  # a folder may be missing on one machine only
            file_to_write("checkpoint", checkpoint)
        run = _begun(operator, num_eigenvalues, tol, seed, *room, max_products, file)
    if len(set(ranks.all_gather_object(run.num_products))) > 1:
        raise ValueError(
            f"The ranks' parts of the checkpoint {checkpoint} are not of the same time: one is "
            "missing or was left behind. Delete them to start anew."
        )
    if file is not None and run.count:
        checkpoints.check_operator(run, file)

    def save() -> None:
        if file is not None:
            with ranks.together():
                checkpoints.try_to_save(run, file)

    if file is None:
        return run.run(max_products, num_checks, allowance, None, on_stop=save)

    def can_save() -> bool:  # several ranks save together, between two steps
        return ranks.world == 1 and run.between_steps

    with (
        keeps_state_on_sigterm(can_save, lambda: checkpoints.try_to_save(run, file)) as ending,
        checkpoints.saved_on_error(run, file),
    ):
        after_step = checkpoints.every(checkpoint_seconds, save, ranks, ending)
        found = run.run(max_products, num_checks, allowance, after_step, on_stop=save)
    if found.stopped not in ("bound", "interrupted"):
        file.unlink(missing_ok=True)
    return found


def _room(
    operator: SymmetricOperator,
    num_eigenvalues: int,
    max_products: int,
    max_basis: int | None,
    storage: BasisStorage,
) -> tuple[BasisStorage, int]:
    """Return where the basis goes, and how many vectors it holds at a restart.

    The bound on products has no say in the latter: a run that is taken up with a higher bound has
    to restart where one without interruption does.
    """
    restarting = min(num_eigenvalues + 3, operator.size)
    least = min(restarting, max_products)
    if max_basis is None:
        wanted = default_basis(num_eigenvalues)
        if not storage.restarts:  # the basis has to hold all steps
            wanted = 3 * wanted
        return placed(storage, min(wanted, operator.size), restarting, operator)
    max_basis = min(max_basis, operator.size)
    if max_basis < least:
        raise ValueError(
            f"A basis of {max_basis} vectors is too small for {num_eigenvalues} eigenvalues; "
            f"it must hold at least {least}."
        )
    return storage, max(max_basis, restarting)


def _begun(
    operator: SymmetricOperator,
    num_eigenvalues: int,
    tol: float,
    seed: int,
    storage: BasisStorage,
    capacity: int,
    max_products: int,
    file: Path | None,
) -> ThickRestart:
    """Return a run in its first state, or in the one that the file holds."""
    header = checkpoints.header_of(file) if file is not None and file.exists() else None
    rows = max_products
    if header is not None:
        capacity, rows = header["capacity"], max(rows, header["shape"][0])
    run = ThickRestart(operator, num_eigenvalues, tol, capacity, seed, storage, rows)
    if header is not None and file is not None:
        checkpoints.check_identity(header, run, file)
        checkpoints.load(run, header, file)
    return run


def default_basis(num_eigenvalues: int) -> int:
    """Return how many vectors are held before a restart."""
    return 4 * num_eigenvalues + 40


def default_bound(num_eigenvalues: int) -> int:
    """Return how many products are spent at most."""
    return 40 * num_eigenvalues + 400

"""Where a Krylov basis lives: on the device, in pinned memory of the CPU, or in a file."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.results import ArgumentError, MeasurementError
from lightning_hessian.results.arguments import memory, one_of, optional
from lightning_hessian.results.path_arguments import existing_folder

_TIERS = ("auto", "device", "cpu", "disk")
_PROJECTED_NUMBERS = 4
"""Matrices [m, m] in float64 that the projected problem takes, its solver's workspace included."""


@dataclass(frozen=True)
class BasisStorage:
    """How much memory a Krylov basis may take, where, and in which precision.

    Args:
        memory: Bytes for each process: the basis, and on the CPU what the projected problem needs
            beside it. By default half of what is free where the basis lives.
        tier: ``"device"``, ``"cpu"`` (pinned memory, streamed to the device), ``"disk"`` (a file
            without a name, gone with the process), ``"disk:FOLDER"``, or ``"auto"``: the device,
            and the CPU where the device cannot hold the least that is needed.
        dtype: ``"bfloat16"`` halves the memory of a float32 basis: vectors are stored in it and
            accumulated in the operator's precision. None stores what the operator computes in.

    With ``"bfloat16"`` the two latest vectors stay in full precision, and so does the recurrence.
    The stored ones serve to keep new vectors orthogonal, which their rounding spoils by about
    1e-3 / sqrt(n). Eigenvalues feel that squared, residual bounds as it is. Measured on matrices
    with eigenvectors spread over all n entries, K = 20 or 100, bounds include a margin of 4:

    ==========================  ========  ====================  ======================
    lambda_k                    n         error / lambda_k      bound / lambda_1
    ==========================  ========  ====================  ======================
    1 to 0.5, then 0.45 / k     4,000     1e-8 (float32 3e-8)   2e-4 (float32 2e-6)
    1 / k, to k = 20            4,000     9e-8 (float32 7e-8)   2e-4 (float32 5e-6)
    k^-1.5, to k = 20           4,000     1e-5 (float32 6e-8)   2e-4 (float32 4e-8)
    k^-1.5, to k = 100          20,000    7e-4 (float32 2e-7)   8e-3 (float32 8e-9)
    ==========================  ========  ====================  ======================

    So it serves for eigenvalues within a decade or so of lambda_1: smaller ones are found, but are
    not shown to have converged at tol = 1e-3, and are not counted as such. A restart would put
    rounded vectors into the place of exact ones; there is none, and a run ends when the basis is
    full. Ritz vectors are off by up to 0.4 % of their length.

    Raises:
        ValueError: An unknown tier or precision, or no memory at all.

    Example:
        >>> BasisStorage(memory=2e9, tier="disk:.").folder
        '.'
    """

    memory: float | None = None
    tier: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.tier, str) and self.tier.startswith("disk:")):
            one_of(*_TIERS, "disk:FOLDER")("tier", self.tier)
        if self.tier == "disk:FOLDER" and not os.path.isdir("FOLDER"):
            raise ArgumentError("tier", self.tier, "Name the folder behind 'disk:'.")
        if self.folder is not None:
            existing_folder("tier, its folder", self.folder)
        one_of(None, "bfloat16")("dtype", self.dtype)
        optional(memory)("memory", self.memory)

    @property
    def folder(self) -> str | None:
        """Where the file is made; None for the default of the system."""
        return self.tier.partition(":")[2] or None

    @property
    def restarts(self) -> bool:
        """Whether the vectors are exact enough to go on from combinations of them."""
        return self.dtype is None

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """Return the precision of storage for an operator in ``dtype``."""
        return dtype if self.dtype is None else torch.bfloat16

    def allocate(
        self, capacity: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return room for vectors, [capacity, length], not initialised.

        Raises:
            MeasurementError: There is no room in the folder.
        """
        stored = self.stored(dtype)
        if self.tier.startswith("disk"):
            return _in_a_file(capacity, length, stored, self.folder)
        if self.tier == "cpu" and device.type == "cuda":
            return torch.empty(capacity, length, dtype=stored, pin_memory=True)
        return torch.empty(capacity, length, dtype=stored, device=device)


ANYWHERE = BasisStorage()


def placed(
    storage: BasisStorage, wanted: int, least: int, operator: SymmetricOperator
) -> tuple[BasisStorage, int]:
    """Return where to hold a basis, ``"auto"`` resolved, and how many vectors.

    Args:
        storage: What is allowed.
        wanted: As many vectors as would be good.
        least: As many as there must be.
        operator: Whose vectors they are.

    Raises:
        MeasurementError: Not even ``least`` vectors fit; says how many do, and what would help.
    """
    shard = operator.shard
    vector_bytes = max(1, shard.length) * storage.stored(operator.dtype).itemsize
    tiers = [storage.tier]
    if storage.tier == "auto":
        tiers = ["device", "cpu"] if operator.device.type == "cuda" else ["device"]
    fitting = 0
    for tier in tiers:
        here = _fitting(storage, tier, vector_bytes, operator)
        fitting = int(shard.ranks.all_reduce_min(here))
        if fitting >= least:
            chosen = BasisStorage(storage.memory, tier, storage.dtype)
            return chosen, min(wanted, fitting)
    raise MeasurementError(_no_room(storage, max(fitting, 0), least, vector_bytes, operator))


def _fitting(
    storage: BasisStorage, tier: str, vector_bytes: int, operator: SymmetricOperator
) -> int:
    """Return how many vectors fit into a tier on this rank."""
    place = operator.device if tier == "device" else torch.device("cpu")
    on_disk = tier.startswith("disk")
    if storage.memory is None:
        free = _free_on_disk(storage.folder) if on_disk else free_bytes(place)
        return int(free / 2 / operator.shard.ranks.neighbours / vector_bytes) - 1
    if on_disk or place.type != "cpu":
        return int(storage.memory / vector_bytes)
    # What the projected problem of m vectors needs lies in the same memory:
    # m vector_bytes + 8 * 4 m^2 = memory.
    square = 8 * _PROJECTED_NUMBERS
    root = math.sqrt(vector_bytes**2 + 4 * square * storage.memory)
    return int(2 * storage.memory / (vector_bytes + root))


def _no_room(
    storage: BasisStorage,
    fitting: int,
    least: int,
    vector_bytes: int,
    operator: SymmetricOperator,
) -> str:
    """Return what to say where a basis does not fit, with what would."""
    limit = (
        "half of the free memory"
        if storage.memory is None
        else f"the memory allowed, {storage.memory / 1e9:.3g} GB"
    )
    needed = least * vector_bytes / 1e9
    ways = ["lower `num_eigenvalues`" + (f" to {fitting - 3} at most" if fitting > 3 else "")]
    if storage.dtype is None and operator.dtype == torch.float32:
        half = f"(basis=BasisStorage(dtype='bfloat16'), {needed / 2:.3g} GB)"
        ways.append(f"store it in half the space {half}")
    if not storage.tier.startswith("disk"):
        file = f"basis=BasisStorage(tier='disk:FOLDER'), {needed:.3g} GB"
        ways.append(f"put it into a file ({file})")
    ways.append("select fewer parameters (`parameters=`)")
    return (
        f"A basis of {least} vectors of {operator.shard.length:,} numbers takes {needed:.3g} GB, "
        f"and {fitting} vectors fit into {limit}. To go on: {', or '.join(ways)}."
    )


def _free_on_disk(folder: str | None) -> float:
    statistics = os.statvfs(folder or tempfile.gettempdir())
    return float(statistics.f_bavail * statistics.f_frsize)


def _in_a_file(capacity: int, length: int, dtype: torch.dtype, folder: str | None) -> Tensor:
    """Return a tensor whose memory is a file; the file has no name and goes with the tensor."""
    numbers = max(1, capacity * length)
    needed = numbers * dtype.itemsize
    if needed > _free_on_disk(folder):
        raise MeasurementError(
            f"A basis of {capacity} vectors takes {needed / 1e9:.3g} GB on disk, and "
            f"{_free_on_disk(folder) / 1e9:.3g} GB are free in {folder or tempfile.gettempdir()}. "
            "Choose another folder (tier='disk:FOLDER')."
        )
    handle, path = tempfile.mkstemp(prefix="lightning_hessian_basis_", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later on
            os.posix_fallocate(handle, 0, needed)
        else:
            os.truncate(handle, needed)
        rows = torch.from_file(path, shared=True, size=numbers, dtype=dtype)
    finally:
        os.close(handle)
        os.unlink(path)  # the mapping keeps the file alive, and nothing is left behind
    return rows[: capacity * length].view(capacity, length)

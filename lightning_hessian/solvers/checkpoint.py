"""Lanczos runs on disk: written as a whole or not at all, read without running any code."""

from __future__ import annotations

import io
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.distributed import Ranks
from lightning_hessian.operators.linear import SymmetricOperator
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.base import text_of
from lightning_hessian.solvers.projected import Projected
from lightning_hessian.solvers.thick_restart import Pending, RitzPairs, ThickRestart

_MAGIC = b"LHLANCZ1"
_BLOCK_BYTES = 64 * 2**20
_SAME = 0.02
"""Relative difference of a product at which an operator is taken for another one."""


def file_of(path: str | os.PathLike[str], operator: SymmetricOperator) -> Path:
    """Returns where this rank keeps its part: ``path``, or beside it with the rank's number."""
    ranks, path = operator.shard.ranks, Path(path)
    if ranks.world == 1:
        return path
    return path.with_name(f"{path.name}.rank{ranks.rank}of{ranks.world}")


def identity(run: ThickRestart) -> dict[str, Any]:
    """Returns what must agree for a run to be continued."""
    return {
        "n": run.operator.size,
        "dtype": str(run.operator.dtype),
        "num_eigenvalues": run.wanted,
        "tol": run.tol,
        "seed": run.seed,
        "basis_dtype": run.storage.dtype,
    }


def save(run: ThickRestart, path: Path) -> None:
    """Writes the state of a run; the file of before stays until the new one is complete.

    The basis goes to disk block by block: no second copy of it is made in memory.
    """
    found = run.found
    header = {
        "identity": identity(run),
        "capacity": run.basis.capacity,
        "generator": run.generator.get_state(),
        "numbers": run.projected.numbers[: run.count, : run.count].clone(),
        "rounded": run.projected.rounded,
        "off_diagonal": run.projected.off_diagonal,
        "pending": [(p.vector.cpu(), p.coupling) for p in run.pending],
        "recent": {i: row.cpu() for i, row in run.basis.recent.items()},
        "scale": run.scale,
        "num_products": run.num_products,
        "next_check": run.next_check,
        "search_until": run.search_until,
        "found": None
        if found is None
        else {
            "values": torch.from_numpy(np.array(found.values)),
            "residuals": torch.from_numpy(np.array(found.residuals)),
            "converged": torch.from_numpy(np.array(found.converged)),
            "lowest": found.lowest,
            "lowest_residual": found.lowest_residual,
            "num_products": found.num_products,
            "stopped": found.stopped,
        },
        "shape": tuple(run.basis.rows[: run.count].shape),
    }
    packed = io.BytesIO()
    torch.save(header, packed)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC)
            file.write(len(packed.getbuffer()).to_bytes(8, "little"))
            file.write(packed.getbuffer())
            for part in _blocks(run):
                file.write(_bytes_of(run.basis.rows[part].to("cpu").contiguous()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def header_of(path: Path) -> dict[str, Any]:
    """Returns what a file says of a run, without its basis.

    Raises:
        ValueError: The file is none of ours, or damaged.
    """
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(
                f"{path} is no checkpoint of a Lanczos run. Give another path, or delete it."
            )
        length = int.from_bytes(file.read(8), "little")
        packed = file.read(length)
        begin = file.tell()
        left = file.seek(0, os.SEEK_END) - begin
    try:
        header = torch.load(io.BytesIO(packed), weights_only=True)
    except Exception as error:
        raise ValueError(f"The checkpoint {path} is damaged. Delete it to start anew.") from error
    number = torch.bfloat16 if header["identity"]["basis_dtype"] else None
    dtype = number or getattr(torch, header["identity"]["dtype"].removeprefix("torch."))
    rows, columns = header["shape"]
    if left != rows * columns * torch.empty((), dtype=dtype).element_size():
        raise ValueError(f"The checkpoint {path} is damaged. Delete it to start anew.")
    header["begin"] = begin
    return header


def check_identity(header: dict[str, Any], run: ThickRestart, path: Path) -> None:
    """Checks that a file belongs to the same problem.

    Raises:
        ValueError: It does not; says what differs.
    """
    ours = identity(run)
    theirs = header["identity"]
    different = [
        f"{name} {theirs.get(name)!r} there, {value!r} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if not different and header["shape"][1] != run.shard.length:
        different = [f"{header['shape'][1]} entries on this rank there, {run.shard.length} here"]
    if different:
        raise ValueError(
            f"The checkpoint {path} is of another run ({'; '.join(different)}). Give another "
            "path, the same arguments, or delete it."
        )


def load(run: ThickRestart, header: dict[str, Any], path: Path) -> None:
    """Puts a run into the state of a file."""
    device = run.operator.device
    run.generator.set_state(header["generator"])
    projected = Projected(tridiagonal_from=run.projected.tridiagonal_from)
    projected.count = len(header["numbers"])
    projected.numbers, projected.rounded = header["numbers"], header["rounded"]
    projected.off_diagonal = header["off_diagonal"]
    run.projected = projected
    run.pending = [Pending(v.to(device), coupling) for v, coupling in header["pending"]]
    run.scale, run.num_products = header["scale"], header["num_products"]
    run.next_check, run.search_until = header["next_check"], header["search_until"]
    with open(path, "rb") as file:
        file.seek(header["begin"])
        for part in _blocks(run):
            rows = torch.empty(run.basis.rows[part].shape, dtype=run.basis.rows.dtype)
            file.readinto(_bytes_of(rows))
            run.basis.rows[part] = rows.to(run.basis.rows.device)
    run.basis.recent = {i: row.to(device) for i, row in header["recent"].items()}
    if header["found"] is not None:
        arrays = {
            name: header["found"][name].numpy() for name in ("values", "residuals", "converged")
        }
        vectors = run.basis.rows[: len(arrays["values"])]
        run.found = RitzPairs(vectors=vectors, **(header["found"] | arrays))


def check_operator(run: ThickRestart, path: Path) -> None:
    """Checks by one product, which is not counted, that the operator is the one of before.

    Raises:
        ValueError: Its product with the first basis vector is another.
    """
    if run.count == 0:
        return
    vector = run.basis[0]
    product = run.operator.matvec(vector)
    row = run.projected.numbers[0, : run.count].square().sum()
    row = row + sum(float(pending.coupling[0]) ** 2 for pending in run.pending)
    length, along = float(row**0.5), float(run.projected.numbers[0, 0])
    difference = max(
        abs(float(run.shard.norm(product)) - length),
        abs(float(run.shard.dot(vector, product)) - along),
    )
    if not difference <= _SAME * length:
        raise ValueError(
            f"The checkpoint {path} is of another matrix of the same order (a product differs). "
            "Load the same weights and the same batches, give another path, or delete it."
        )


def check_writable(path: Path) -> None:
    """Check that the state of a run can be written, before the work.

    Raises:
        ArgumentError: There is no such folder, or nothing can be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        handle, temporary = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
        os.close(handle)
        os.unlink(temporary)
    except OSError as error:
        raise ArgumentError(
            "checkpoint", str(path), f"It cannot be written ({error}). Give a file in a folder "
            "that exists and can be written to."
        ) from error  # fmt: skip


def tell_unsaved(path: Path, error: Exception) -> None:
    """Warn that the state could not be saved; the work itself goes on, or ends as it would."""
    warnings.warn(
        f"The state of the run could not be saved to {path} ({type(error).__name__}: "
        f"{text_of(error)}); an interruption now loses it. Make room there, or give another path.",
        stacklevel=3,
    )


class Terminated(SystemExit):
    """The process was told to end by SIGTERM."""


@contextmanager
def saved_on_error(run: ThickRestart, path: Path | None) -> Iterator[Callable[[], None]]:
    """A block whose run is saved if an exception or SIGTERM ends it.

    It is given a function to be called between two steps, where a SIGTERM that came within a step
    takes effect. The exception that ended the block stands, whether or not it could be saved.
    """
    terminated = False

    def keep() -> None:
        if path is not None and run.between_steps and run.count:
            try:
                save(run, path)
            except Exception as error:  # noqa: BLE001 - it must not hide what ended the run
                tell_unsaved(path, error)

    def on_signal() -> None:
        nonlocal terminated
        terminated = True
        if run.between_steps:
            raise Terminated(128 + signal.SIGTERM)

    def between_steps() -> None:
        if terminated:
            raise Terminated(128 + signal.SIGTERM)

    try:
        with _sigterm(keep, on_signal) if path is not None else nullcontext():
            try:
                yield between_steps
            except BaseException:
                keep()
                raise
    except Terminated:
        # The state is on disk and the default handler is back: end as the sender expects.
        os.kill(os.getpid(), signal.SIGTERM)
        raise


@contextmanager
def _sigterm(keep: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """A block in which SIGTERM saves first, and then does what it would have done before.

    A handler that stands there (Lightning's, which ends the run in good order) is called after
    the state was saved, and comes back after the block. Only the main thread gets signals.
    """
    before = signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is None or before == signal.SIG_IGN:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if callable(before):
            keep()
            before(number, frame)
        else:
            end()

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handle:  # else someone has put another one there
            signal.signal(signal.SIGTERM, before)


def every(seconds: float, save: Callable[[], None], ranks: Ranks) -> Callable[[], None]:
    """Returns a function that saves where this was last done so many seconds ago, on all ranks."""
    last = time.monotonic()

    def maybe() -> None:
        nonlocal last
        if ranks.any(time.monotonic() - last >= seconds):
            save()
            last = time.monotonic()

    return maybe


def _blocks(run: ThickRestart) -> Iterator[slice]:
    rows = run.basis.rows
    step = max(1, _BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    for start in range(0, run.count, step):
        yield slice(start, min(start + step, run.count))


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data.cast("B")

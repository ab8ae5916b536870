"""Lanczos runs on disk: written as a whole or not at all, read without running any code."""

from __future__ import annotations

import io
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.npz import require_stored
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.outside import open_regular, unreadable
from lightning_hessian.solvers.krylov import Pending, RitzPairs
from lightning_hessian.solvers.projected import Projected
from lightning_hessian.solvers.termination import Terminated
from lightning_hessian.solvers.thick_restart import ThickRestart

_MAGIC = b"LHLANCZ1"
_ARRAYS = ("values", "residuals", "converged")
_BLOCK_BYTES = 64 * 2**20
_SAME = 0.02
"""Relative difference of a product at which an operator is taken for another one."""


def file_of(path: str | os.PathLike[str], operator: SymmetricOperator) -> Path:
    """Return where this rank keeps its part: ``path``, or beside it with the rank's number."""
    ranks, path = operator.shard.ranks, Path(path)
    if ranks.world == 1:
        return path
    return path.with_name(f"{path.name}.rank{ranks.rank}of{ranks.world}")


def identity(run: ThickRestart) -> dict[str, Any]:
    """Return what must agree for a run to be continued."""
    return {
        "n": run.operator.size,
        "dtype": str(run.operator.dtype),
        "num_eigenvalues": run.wanted,
        "tol": run.tol,
        "seed": run.seed,
        "basis_dtype": run.storage.dtype,
        "engine": _digits_of(getattr(run.operator, "engine", "exact")),
        "matrix": getattr(run.operator, "matrix_kind", "hessian"),
    }


def _digits_of(engine: str) -> str:
    """Return an engine without what changes no digit: whether a graph is kept or recomputed."""
    parts = {"autograd" if part == "recompute" else part for part in engine.split("+")}
    return "+".join(sorted(parts))


def save(run: ThickRestart, path: Path) -> None:
    """Write the state of a run; the file of before stays until the new one is complete.

    The basis goes to disk block by block: no second copy of it is made in memory.
    """
    found = None
    if run.found is not None:
        arrays = {name: torch.from_numpy(np.array(getattr(run.found, name))) for name in _ARRAYS}
        found = vars(run.found) | arrays | {"vectors": None}
    header = {
        "identity": identity(run),
        "capacity": run.capacity,
        "generator": run.generator.get_state(),
        "numbers": run.projected.numbers[: run.count, : run.count].clone(),
        "rounded": run.projected.rounded,
        "off_diagonal": run.projected.off_diagonal,
        "pending": [(p.vector.cpu(), p.coupling, p.is_fresh) for p in run.pending],
        "recent": {i: row.cpu() for i, row in run.basis.recent.items()},
        "scale": run.scale,
        "num_products": run.num_products,
        "next_check": run.next_check,
        "search_until": run.search_until,
        "found": found,
        "shape": tuple(run.basis.rows[: run.count].shape),
    }
    packed = io.BytesIO()
    torch.save(header, packed)
    with atomic_write(path) as file:
        file.write(_MAGIC)
        file.write(len(packed.getbuffer()).to_bytes(8, "little"))
        file.write(packed.getbuffer())
        for part in _blocks(run):
            file.write(_bytes_of(run.basis.rows[part].to("cpu").contiguous()))


def header_of(path: Path) -> dict[str, Any]:
    """Return what a file says of a run, without its basis.

    Raises:
        UnreadableFileError: The file is none of ours, or damaged; a ValueError.
    """
    damaged = "Delete it to start anew."
    with open_regular(path) as file, unreadable(f"The checkpoint {path}", damaged):
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UnreadableFileError(
                f"{path} is no checkpoint of a Lanczos run. Give another path, or delete it."
            )
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        begin = file.tell() + length
        if begin > size:
            raise ValueError("its header is cut short")
        packed = io.BytesIO(file.read(length))
        with zipfile.ZipFile(packed) as archive:
            require_stored(archive, path)
        packed.seek(0)
        header: dict[str, Any] = torch.load(packed, weights_only=True)
        dtype = _basis_dtype(header["identity"])
        rows, columns = (int(number) for number in header["shape"])
        if size - begin != rows * columns * dtype.itemsize:
            raise ValueError("its basis is cut short")
        if len(header["numbers"]) != rows:
            raise ValueError("its header is of another basis")
        vectors = [vector for vector, *_ in header["pending"]]
        if not all(part.isfinite().all() for part in (header["numbers"], *vectors)):
            raise ValueError("it holds numbers that are not finite")
    header["begin"] = begin
    return header


def _basis_dtype(identity: dict[str, Any]) -> torch.dtype:
    if identity["basis_dtype"]:
        return torch.bfloat16
    dtype = getattr(torch, identity["dtype"].removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise TypeError("its dtype is none of torch's")
    return dtype


def check_identity(header: dict[str, Any], run: ThickRestart, path: Path) -> None:
    """Check that a file belongs to the same problem.

    Raises:
        ValueError: It does not; says what differs.
    """
    ours = identity(run)
    # Older files name neither.
    theirs = {"engine": ours["engine"], "matrix": "hessian"} | header["identity"]
    different = [
        f"{name} {theirs.get(name)!r} there, {value!r} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if not different and header["shape"][1] != run.shard.length:
        different = [f"{header['shape'][1]} entries on this rank there, {run.shard.length} here"]
    if different:
        # Where memory has changed what "auto" chose, the engine must be named.
        known = theirs["engine"] != ours["engine"] and "+" not in theirs["engine"]
        engine = f" (hvp={theirs['engine']!r})" if known else ""
        raise ValueError(
            f"The checkpoint {path} is of another run ({'; '.join(different)}). Give another "
            f"path, the same arguments{engine}, or delete it."
        )


def load(run: ThickRestart, header: dict[str, Any], path: Path) -> None:
    """Put a run into the state of a file.

    Raises:
        UnreadableFileError: Its parts do not fit together; a ValueError.
    """
    device = run.operator.device
    with unreadable(f"The checkpoint {path}", "Delete it to start anew."):
        run.generator.set_state(header["generator"])
        projected = Projected(tridiagonal_from=run.projected.tridiagonal_from)
        projected.count = len(header["numbers"])
        projected.numbers, projected.rounded = header["numbers"], header["rounded"]
        projected.off_diagonal = header["off_diagonal"]
        run.projected = projected
        run.pending = [Pending(v.to(device), *rest) for v, *rest in header["pending"]]
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
            arrays = {name: header["found"][name].numpy() for name in _ARRAYS}
            vectors = run.basis.rows[: len(arrays["values"])]
            run.found = RitzPairs(**(header["found"] | arrays | {"vectors": vectors}))


def check_operator(run: ThickRestart, path: Path) -> None:
    """Check by one product, which is not counted, that the operator is the one of before.

    Raises:
        ValueError: Its product with the first basis vector is another.
    """
    if run.count == 0:
        return
    vector = run.basis[0]
    product = run.operator.matvec(vector)
    with unreadable(f"The checkpoint {path}", "Delete it to start anew."):
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


@contextmanager
def saved_on_error(run: ThickRestart, path: Path | None) -> Iterator[None]:
    """Open a block whose run is saved if an exception ends it; that exception is the one to see."""
    try:
        yield
    except BaseException:
        if path is not None and run.between_steps and run.count:
            try_to_save(run, path)
        raise


def try_to_save(run: ThickRestart, path: Path) -> None:
    """Save a run, or warn: a full disk must hide neither a result nor the cause of an error."""
    if run.count == 0:  # there is nothing yet
        return
    try:
        save(run, path)
    except OSError as error:
        warnings.warn(
            f"The checkpoint {path} could not be written ({error}); the measurement goes on "
            "without it.",
            stacklevel=2,
        )


def every(
    seconds: float, save: Callable[[], None], ranks: Ranks, ending: Callable[[], bool]
) -> Callable[[], None]:
    """Return a function that saves where this was last done so many seconds ago, on all ranks.

    Args:
        seconds: How many.
        save: Saves the run.
        ranks: They save together, so that their parts are of the same time.
        ending: Whether the process was asked to end: then it saves at once.

    Raises:
        Terminated: From the function, after it saved, on a rank that is to end.
    """
    last = time.monotonic()

    def maybe() -> None:
        nonlocal last
        if ranks.any(ending() or time.monotonic() - last >= seconds):
            save()
            last = time.monotonic()
        if ending():
            raise Terminated

    return maybe


def _blocks(run: ThickRestart) -> Iterator[slice]:
    rows = run.basis.rows
    step = max(1, _BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    for start in range(0, run.count, step):
        yield slice(start, min(start + step, run.count))


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).numpy().data.cast("B")

"""Work in processes that may die or hang: what they were at is given up, the rest goes on.

`concurrent.futures.ProcessPoolExecutor` gives up everything when one process dies (it was killed
for memory, say), and cannot end one that hangs (on a file system that does not answer).
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from lightning_hessian.results.outside import reason

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    method: str,
    seconds: float | None,
    failed: Callable[[Item, str], Result] | None,
    done: Callable[[int], None],
) -> list[Result]:
    """Return ``function(item)`` of every item, in order, as `map_runs` describes it.

    Args:
        function: Defined at the top of a module, so that processes find it.
        items: Each is worked on by one process.
        workers: How many processes.
        method: How they start, ``"fork"`` or ``"spawn"``.
        seconds: How long one item may take; for ever if None.
        failed: What stands for an item whose process died or took too long.
        done: Called with the number of items done.
    """
    results: dict[int, Result] = {}
    waiting = iter(range(len(items)))
    running = [_Worker(function, method) for _ in range(workers)]
    try:
        for worker in running:
            worker.give(next(waiting, None), items, seconds)
        while len(results) < len(items):
            for place, worker in enumerate(running):
                if worker.at is None:
                    continue
                found = worker.outcome()
                if found is None:
                    continue
                at, (kind, value) = worker.at, found
                if kind == "raised":
                    raise value
                if kind == "lost":
                    if failed is None:
                        raise RuntimeError(f"{value} Try workers=1.")
                    results[at] = failed(items[at], value)
                    worker.end()
                    worker = running[place] = _Worker(function, method)
                else:
                    results[at] = value
                done(len(results))
                worker.give(next(waiting, None), items, seconds)
            wait([w.pipe for w in running if w.at is not None], timeout=_pause(running))
    finally:
        for worker in running:
            worker.end()
    return [results[place] for place in range(len(items))]


class _Worker:
    """A process, the pipe to it, and the place of the item that it is at."""

    def __init__(self, function: Callable[[Any], Any], method: str) -> None:
        context = get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.at: int | None = None
        self.seconds: float | None = None
        self.until = float("inf")
        # A fresh interpreter imports torch first, which is not the item's time.
        self.is_ready = False

    def _begin(self) -> None:
        if self.is_ready and self.seconds is not None:
            self.until = time.monotonic() + self.seconds

    def give(self, at: int | None, items: Sequence[Any], seconds: float | None) -> None:
        """Send the next item, if there is one."""
        self.at = at
        if at is None:
            return
        self.seconds = seconds
        self._begin()
        # Where it died between two items, `outcome` finds the end of the pipe.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(items[at])

    def outcome(self) -> tuple[str, Any] | None:
        """Return what became of the item: ``"done"``, ``"raised"`` or ``"lost"``; None as yet."""
        try:
            if self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind != "ready":
                    return kind, value
                self.is_ready = True
                self._begin()
        except (EOFError, OSError):
            self.process.join(1)
            return "lost", f"the process that read it died (exit code {self.process.exitcode})."
        if time.monotonic() > self.until:
            return "lost", f"it took more than {self.seconds:g} s."
        return None

    def end(self) -> None:
        """End the process, and wait until it has ended."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _pause(running: Sequence[_Worker]) -> float | None:
    first = min((worker.until for worker in running if worker.at is not None), default=0.0)
    return None if first == float("inf") else max(0.0, first - time.monotonic()) + 0.01


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Work on one item after the other until the pipe, or the process that asks, ends."""
    parent = parent_process()
    ends = [] if parent is None else [parent.sentinel]
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        pipe.send(("ready", None))
        # Forked processes hold each other's pipes open, so that the end of the asking process may
        # not end the pipe.
        while pipe in wait([pipe, *ends]):
            item = pipe.recv()
            try:
                answer = ("done", function(item))
            except Exception as error:  # noqa: BLE001 - it is raised again where it was asked for
                answer = ("raised", _portable(error))
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """Return an exception that survives the way through a pipe."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever its class does there
        return RuntimeError(reason(error))
    return error

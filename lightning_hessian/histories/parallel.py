"""Work on many runs at once, with progress on the terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_FEW = 12  # runs that are done before a forked process would have started
_SOME = 150  # the same for a fresh interpreter, which imports torch first


class Progress:
    """A line on the terminal that counts; silent where nobody is looking.

    Args:
        shown: Whether to print; by default if standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self.shown = sys.stderr.isatty() if shown is None else shown

    def count(self, what: str, done: int, total: int) -> None:
        """Print how far it is."""
        if self.shown and total >= _FEW:
            end = "\n" if done == total else ""
            print(f"\r{what}: {done} of {total} runs", end=end, file=sys.stderr, flush=True)


def map_runs(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    what: str,
    progress: Progress,
    threads: int = 0,
    workers: int | None = None,
    seconds: float | None = None,
    failed: Callable[[Item, str], Result] | None = None,
) -> list[Result]:
    """Return ``function(item)`` of every item, in order.

    Args:
        function: Defined at the top of a module, so that processes find it.
        items: Few are worked on here; more in processes, or in ``threads`` where that is given.
        what: What is done, for the progress line.
        progress: Where it is shown.
        threads: How many threads instead of processes, for work that waits for a server.
        workers: How many processes; by default one for each usable core, or none where they
            would not pay.
        seconds: How long one item may take in a process, which is ended then; for ever by default.
        failed: What stands for an item whose process died or took too long, of the item and the
            reason.

    Raises:
        Exception: That of the first item that raised.
        RuntimeError: A process died or took too long, and there is no ``failed``.
    """
    listed: Sequence[Item] = list(items)
    worth_it = len(listed) >= (_SOME if workers is None and _method() == "spawn" else _FEW)
    workers = workers or usable_cores()
    if not threads and (workers == 1 or not worth_it):
        results = []
        for done, item in enumerate(listed, 1):
            results.append(function(item))
            progress.count(what, done, len(listed))
        return results
    if not threads:
        from lightning_hessian.histories.processes import map_in_processes

        return map_in_processes(
            function,
            listed,
            workers=min(workers, len(listed)),
            method=_method(),
            seconds=seconds,
            failed=failed,
            done=lambda count: progress.count(what, count, len(listed)),
        )
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item) for item in listed]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress.count(what, done, len(listed))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def usable_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _method() -> str:
    """Return how processes start: forked, at once, while no other thread may hold a lock."""
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"

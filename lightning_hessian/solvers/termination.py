"""SIGTERM, as schedulers and containers send it: the state of a run is kept before the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """The process was asked to end; no error, so that nothing that catches errors stops it."""


@contextmanager
def keeps_state_on_sigterm(may_end_now: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """A block that SIGTERM leaves as an exception, so that what saves on exceptions saves.

    Only the default action of SIGTERM, which ends the process at once, is replaced, and put back
    when the block ends; a handler of the user's (Lightning has one) stays in charge. Having left
    the block the process ends by SIGTERM after all, as whoever sent it expects.

    Args:
        may_end_now: Whether the state can be saved at this moment. Where it cannot, the block
            has to ask what it was given, and to raise `Terminated` itself.

    Yields:
        A function that tells whether SIGTERM has come.
    """
    # Signal handlers belong to the main thread (docs.python.org, signal.signal).
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield lambda: False
        return
    asked = False

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if may_end_now():
            raise Terminated

    signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)

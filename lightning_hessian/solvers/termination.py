"""SIGTERM, as schedulers and containers send it: the state of a run is kept before the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """The process was asked to end; no error, so that nothing that catches errors stops it."""


@contextmanager
def keeps_state_on_sigterm(
    may_end_now: Callable[[], bool], save: Callable[[], None]
) -> Iterator[Callable[[], bool]]:
    """Open a block that SIGTERM leaves as an exception, so that what saves on exceptions saves.

    Where the default action of SIGTERM stands, the process ends by SIGTERM after all once the
    block is left, as whoever sent it expects. A handler that stands there (Lightning's, which ends
    a run in good order) is called after the state was saved, and decides. What stood there is put
    back when the block ends.

    Args:
        may_end_now: Whether the state can be saved at this moment. Where it cannot, the block
            has to ask what it was given, and to raise `Terminated` itself.
        save: Saves the state.

    Yields:
        A function that tells whether SIGTERM has come.
    """
    before = signal.getsignal(signal.SIGTERM)
    # Signal handlers belong to the main thread (docs.python.org, signal.signal).
    here = threading.current_thread() is threading.main_thread()
    if not here or before in (signal.SIG_IGN, None):
        yield lambda: False
        return
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if callable(before):
            if may_end_now():
                save()
            before(number, frame)
            return
        asked = True
        if may_end_now():
            raise Terminated

    signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: asked
    finally:
        if signal.getsignal(signal.SIGTERM) is handler:  # else somebody has put another one there
            signal.signal(signal.SIGTERM, before)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)

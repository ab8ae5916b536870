"""The checkpoint folder of a run that is going on: what is there, and whether it is whole yet.

Nothing is locked and nothing written. A checkpoint may be half-written, changed in place, or gone
again before it could be read; all three are ordinary.
"""

from __future__ import annotations

import os
import stat
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lightning_hessian.cli.sharded_checkpoints import INDEX, LIGHTNINGS_PART, PARTS
from lightning_hessian.results import bounds

PATIENCE = 60.0
"""Seconds after which a checkpoint that no longer changes is taken to be as whole as it will be."""

_PUT_OFF = 2.0
"""Seconds until a checkpoint is tried again that could not be read."""

_REPEATED = 10 * 10**9
"""Nanoseconds within which ``last.ckpt`` repeats another checkpoint."""

_MOST = 100_000
"""Names that are looked at in one look; a run has a few hundred."""


@dataclass(frozen=True)
class Version:
    """A checkpoint as it is at one time: the same path may hold another one later.

    Attributes:
        path: A file, or a folder that ranks write in parts.
        bytes: Its size, of a folder that of its files.
        modified: When it changed last, in nanoseconds.
    """

    path: Path
    bytes: int
    modified: int


def version_of(path: Path) -> Version:
    """Return a checkpoint as it is now.

    Raises:
        OSError: There is none.
    """
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        return Version(path, found.st_size, found.st_mtime_ns)
    size, modified = 0, 0
    with os.scandir(path) as entries:
        for entry in entries:
            part = entry.stat()
            size, modified = size + part.st_size, max(modified, part.st_mtime_ns)
    return Version(path, size, modified or found.st_mtime_ns)


def versions_in(folder: Path) -> list[Version]:
    """Return the checkpoints in a folder and below, the newest first.

    What vanishes while it is looked at is not there.
    """
    found = []
    for path in _checkpoints(folder):
        try:
            found.append(version_of(path))
        except OSError:
            continue
    return sorted(found, key=_newness, reverse=True)


def is_last(path: Path) -> bool:
    """Whether a checkpoint is Lightning's ``last.ckpt``, or ``last-v1.ckpt``."""
    return path.stem.startswith("last")


def _newness(version: Version) -> tuple[int, Path]:
    """Return what orders checkpoints in time.

    ``last.ckpt`` is written right after the checkpoint that it repeats, and comes after it here:
    the other one has the better name, and will not be overwritten.
    """
    return version.modified - (_REPEATED if is_last(version.path) else 0), version.path


def _checkpoints(folder: Path) -> Iterator[Path]:
    count = 0
    for here, folders, files in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        sharded = [name for name in folders if name.endswith(".ckpt")]
        folders[:] = [n for n in folders if n not in sharded and depth < bounds.FOLDER_DEPTH]
        for name in sorted((*sharded, *(n for n in files if n.endswith(".ckpt")))):
            path = Path(here) / name
            if path.is_dir() or path.is_file():  # a pipe would be waited at
                yield path
        count += len(files) + len(folders)
        if count > _MOST:
            return


def looks_whole(version: Version) -> bool:
    """Whether a checkpoint may be read: of a file its end is there, of a folder its last part.

    torch writes the directory of an archive at its end. Lightning writes into a folder the parts of
    the ranks, then the index, then its own part; where a folder is written again, as that of
    ``last.ckpt`` is, the times say whether index and parts are those of before.
    """
    path = version.path
    try:
        if not path.is_dir():
            return zipfile.is_zipfile(path)
        index, last = path / INDEX, path / LIGHTNINGS_PART
        times = [file.stat().st_mtime_ns for file in path.glob(PARTS)]
        in_order = max(times, default=0) <= index.stat().st_mtime_ns <= last.stat().st_mtime_ns
        return bool(times) and in_order and zipfile.is_zipfile(last)
    except OSError:
        return False


class Watch:
    """What waits in a checkpoint folder to be measured.

    Attributes:
        waiting: What was seen last of each checkpoint that is not dealt with, newest first.
        gone: Checkpoints that were deleted, or changed, before they were dealt with, by name.
        changed: When something changed last, on the monotonic clock.
        longest_gap: The longest time between two checkpoints so far, in seconds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: list[Version] = []
        self.gone: list[str] = []
        self.changed: float | None = None
        self.longest_gap = 0.0
        self._dealt: dict[Path, Version] = {}
        self._since: dict[Version, float] = {}
        self._put_off: dict[Version, float] = {}
        self._times: set[int] = set()

    def look(self) -> None:
        """See what is there now."""
        now = time.monotonic()
        there = versions_in(self.folder)
        fresh = [v for v in there if self._dealt.get(v.path) != v]
        if fresh != self.waiting:
            self.changed = now
        left = {v.path for v in there}
        self.gone += [v.path.name for v in self.waiting if v.path not in left]
        self.waiting = fresh
        self._since = {v: self._since.get(v, now) for v in fresh}
        self._times |= {v.modified for v in fresh if looks_whole(v)}
        ordered = sorted(self._times)[-1000:]
        gaps = [(later - earlier) / 1e9 for earlier, later in pairwise(ordered)]
        self.longest_gap = max([self.longest_gap, *gaps])

    def newest(self, *, at_the_end: bool = False) -> Version | None:
        """Return the newest checkpoint that may be read, None where none may.

        One that does not look whole is waited for. Where it has not changed for a minute, or the
        run has ended, it is read as it is, and what is wrong with it is told.
        """
        now = time.monotonic()
        for version in self.waiting:
            if now < self._put_off.get(version, now) and not at_the_end:
                continue
            if looks_whole(version) or self.is_settled(version) or at_the_end:
                return version
        return None

    def is_settled(self, version: Version) -> bool:
        """Whether a checkpoint has been as it is for longer than a checkpoint takes to write."""
        return time.monotonic() - self._since.get(version, time.monotonic()) > PATIENCE

    def put_off(self, version: Version) -> None:
        """Leave a checkpoint alone for a few seconds: it could not be read yet."""
        self._put_off = {version: time.monotonic() + _PUT_OFF}

    def deal_with(self, version: Version) -> None:
        """Take a checkpoint off the list; it comes back where it changes."""
        self._dealt[version.path] = version
        self._times.add(version.modified)
        self.waiting = [other for other in self.waiting if other != version]

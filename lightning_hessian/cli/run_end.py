"""The run beside which a sidecar measures: where it lies, whether it lives, and when it has ended.

Lightning leaves no mark when a fit ends. So several signs are taken, the surest first: the process
that the user named is gone; the offline W&B run has its record of the end; or nothing has changed,
neither among the checkpoints nor in the run's folder, for long enough.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lightning_hessian.cli.watching import Watch
from lightning_hessian.histories.local_runs import RUN_FOLDER, find_local_runs
from lightning_hessian.histories.offline_run import OfflineRun, find_run_file, read_offline_run
from lightning_hessian.histories.wandb_runs import WandbPath, parse_wandb_path

IDLE = 600.0
"""Seconds of quiet that end a run where the user says nothing else."""

GAPS = 3
"""By default as many of the longest times between two checkpoints must have been quiet, too."""

_METRICS, _EVENTS = "metrics.csv", "events.out.tfevents."


class Run:
    """The run that writes the checkpoints, as far as it is known.

    Attributes:
        given: What the user named, a folder or a W&B path; None for what lies around the
            checkpoints: the folder of Lightning's CSVLogger, TensorBoardLogger or WandbLogger.
        folder: Its folder, once there is one.
        remote: Its path on a W&B server.
    """

    def __init__(self, checkpoints: Path, given: str | None) -> None:
        self._checkpoints = checkpoints.absolute()
        self.given = given
        self.folder: Path | None = None
        self.remote: WandbPath | None = None
        if given is not None and not Path(given).exists():
            self.remote = parse_wandb_path(given)
            if self.remote is None or self.remote.run_id is None:
                raise ValueError(
                    f"--run {given}: no such folder, and a W&B path of one run is "
                    "ENTITY/PROJECT/RUN. Give the run's folder, or leave it out."
                )
        self.find()

    def find(self) -> None:
        """Look for the folder, which the run may make later than its checkpoints."""
        if self.given is None:  # looked for again each time: a W&B run that is resumed has another
            self.folder = self._around() or self.folder
        if self.folder is not None or self.given is None or self.remote is not None:
            return
        try:
            runs = find_local_runs(Path(self.given))
        except FileNotFoundError:
            return  # the run has logged nothing yet
        if len(runs) > 1:
            raise ValueError(
                f"--run {self.given} holds {len(runs)} runs. Give the folder of one, such as "
                f"{runs[-1].folder}."
            )
        self.folder = runs[0].folder

    def _around(self) -> Path | None:
        for here in (self._checkpoints, self._checkpoints.parent):
            if here.is_dir():
                names = os.listdir(here)
                if _METRICS in names or any(name.startswith(_EVENTS) for name in names):
                    return here
        # WandbLogger: SAVE_DIR/PROJECT/ID/checkpoints, beside SAVE_DIR/wandb/...run-TIME-ID.
        parents = self._checkpoints.parents
        if len(parents) > 2:
            found = sorted((parents[2] / "wandb").glob("*run-*"))
            mine = [path for path in found if path.name.endswith(f"-{parents[0].name}")]
            return mine[-1] if mine else None
        return None

    @property
    def run_id(self) -> str:
        """Its id at W&B; empty where it has none, or none that is known."""
        if self.remote is not None:
            return self.remote.run_id or ""
        found = RUN_FOLDER.fullmatch(self.folder.name) if self.folder is not None else None
        return found["id"] if found else ""

    def offline(self) -> OfflineRun | None:
        """Return the offline W&B run, None where it is none or cannot be read now."""
        if self.folder is None:
            return None
        try:
            return read_offline_run(find_run_file(self.folder), summary=False)
        except (ValueError, OSError):
            return None

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Return what changes whenever the run writes into its folder."""
        if self.folder is None:
            return ()
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if entry.is_file():
                        stat = entry.stat()
                        found.append((entry.name, stat.st_size, stat.st_mtime_ns))
        except OSError:
            return ()
        return tuple(sorted(found))


class End:
    """Answers whether a run has ended, and how that is known."""

    def __init__(self, run: Run, watch: Watch, idle: float | None, pid: int | None) -> None:
        self._run, self._watch, self._idle = run, watch, idle
        self._pid, self._born = pid, _birth(pid)
        if pid is not None and self._born is None:
            raise ValueError(f"--pid {pid}: there is no such process on this machine.")
        self._seen: Any = None
        self._quiet_since = time.monotonic()
        self._next_reading = 0.0
        self._exit: str | None = None

    def look(self) -> None:
        """See whether something has changed since the last look."""
        now = time.monotonic()
        seen = self._run.state(), self._watch.changed
        if seen != self._seen:
            # Quiet is counted by this clock and from now on: those of other machines may be wrong,
            # and before the second checkpoint nobody knows how long the run takes for one.
            self._quiet_since, self._exit = now, None
            self._next_reading = min(self._next_reading, now + 2.0)
        self._seen = seen

    def has_come(self) -> str | None:
        """Return how it is known that the run has ended, None where it may go on."""
        if self._pid is not None:
            gone = _birth(self._pid) != self._born
            return f"process {self._pid} has ended" if gone else None
        now = time.monotonic()
        if self._exit is None and now >= self._next_reading:
            found = self._run.offline()
            # A long history takes a while to read, and is read seldom.
            self._next_reading = now + max(5.0, 20 * (time.monotonic() - now))
            if found is not None and found.exit_code is not None:
                self._exit = f"its W&B run has ended with exit code {found.exit_code}"
        if self._exit is not None:
            return self._exit
        idle = self._idle
        if idle is None:
            idle = max(IDLE, GAPS * self._watch.longest_gap)
        quiet = now - self._quiet_since
        return f"nothing has changed for {quiet:.0f} s" if quiet >= idle else None


def _birth(pid: int | None) -> str | None:
    """Return what tells a process from a later one of the same number; None where it is gone.

    A process that has ended and that nobody has asked about (a zombie) is gone.
    """
    if pid is None:
        return None
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return _answers(pid) if not Path("/proc/self/stat").exists() else None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> str | None:
    """Return a word where a process exists, on systems without /proc."""
    if os.name == "nt":
        raise ValueError("--pid is not known on Windows. Give --idle SECONDS.")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"

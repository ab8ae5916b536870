"""`lightning-hessian measure FOLDER --follow`: a sidecar that measures a run while it goes on.

It reads the run's checkpoints and writes into its own folder only. A checkpoint is copied before it
is measured, so that the run may delete or overwrite it at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_hessian.cli.checkpoint_spectra import measure_checkpoint, prepared, why
from lightning_hessian.cli.checkpoints import Saved, copy_checkpoint, read_checkpoint
from lightning_hessian.cli.run_end import End, Run
from lightning_hessian.cli.sharded_checkpoints import is_sharded
from lightning_hessian.cli.sidecar_wandb import WandbLog
from lightning_hessian.cli.spectra_folder import (
    check_settings,
    extra_of,
    say,
    settings_of,
    write_tables,
)
from lightning_hessian.cli.watching import Version, Watch, is_last, version_of
from lightning_hessian.histories.marks import MARK, Mark, read_mark
from lightning_hessian.results import ArgumentError, UnreadableFileError
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.outside import parse_json, read_bounded

_BEAT = 10.0
"""Seconds between two signs of life in the sidecar's own folder."""

_NICER = 10
"""By how much the sidecar stands back behind the run where both want a processor."""


def follow_run(options: argparse.Namespace) -> int:
    """Measure the checkpoints of a run as they appear, until the run has ended.

    Returns:
        The exit code: 0, or 1 where some of the checkpoints could not be measured.
    """
    folder = _one_folder(options)
    run = Run(folder, options.of_run)
    _refuse_out_in_the_run(options.out, folder, run)
    cls = prepared(options)
    if options.threads is not None or options.device.type == "cpu":
        torch.set_num_threads(options.threads or 1)
    if hasattr(os, "nice"):
        os.nice(_NICER)
    sidecar = Sidecar(folder, run, cls, options)
    try:
        return sidecar.follow()
    except KeyboardInterrupt:
        say("\nlightning-hessian: stopped; run the same command again to go on.")
        raise SystemExit(130) from None
    finally:
        sidecar.log.close()


def _one_folder(options: argparse.Namespace) -> Path:
    """Return the folder that is followed; it need not exist yet."""
    if len(options.checkpoints) != 1:
        raise ValueError("--follow takes one folder, that of the checkpoints of one run.")
    folder: Path = options.checkpoints[0]
    if folder.suffix == ".ckpt" or folder.is_file() or is_sharded(folder):
        raise ValueError(f"--follow takes a folder of checkpoints, and {folder} is one checkpoint.")
    if options.again:
        raise ValueError("--follow goes on with what is there. Leave out --again.")
    return folder


def _refuse_out_in_the_run(out: Path, folder: Path, run: Run) -> None:
    inside = os.path.realpath(out)
    for place in (folder, run.folder):
        if place is not None and Path(inside).is_relative_to(os.path.realpath(place)):
            raise ArgumentError(
                "--out", str(out), f"It lies in the run's own folder {place}. Give one outside it."
            )


class Sidecar:
    """Measures the checkpoints in one folder, one at a time, the newest first."""

    def __init__(self, folder: Path, run: Run, cls: Any, options: argparse.Namespace) -> None:
        self.options, self.cls, self.run = options, cls, run
        self.watch = Watch(folder.absolute())
        self.end = End(run, self.watch, options.idle, options.pid)
        self.failed: dict[str, str] = {}
        self.measured = 0
        self._spectra = options.out / "spectra"
        self._copies = options.out / "following"
        self._told_left: set[Path] = set()
        self._told_notes: set[str] = set()
        self._last_look = self._last_beat = -_BEAT
        self._identity = self._identity_before() or uuid.uuid4().hex
        self._done: dict[int, tuple[str, str, Path]] = {}
        for file in sorted(self._spectra.glob("*.npz")):
            self._know(file)
        self.log = WandbLog(run, options)

    def _identity_before(self) -> str:
        """Return the identity that the sidecar had when it was stopped, empty where it was not."""
        before, out = read_mark(self.options.out), self.options.out
        if before is None:
            return ""
        mine, theirs = (os.path.realpath(p) for p in (self.watch.folder, before.checkpoints))
        if before.checkpoints and mine != theirs:
            raise ArgumentError(
                "--out", str(out), f"It has spectra of {before.checkpoints}. Give another folder."
            )
        return before.identity

    # What is there ------------------------------------------------------------------------------

    def _know(self, file: Path) -> dict[str, Any] | None:
        """Take in a spectrum that has been measured; return what stands beside it."""
        try:
            extra = extra_of(file)
        except (UnreadableFileError, OSError) as error:
            say(f"{error} It is measured again.")
            return None
        check_settings(extra["settings"], self.options)
        source, row = extra["source"], extra["row"]
        path = Path(source["path"])
        self._done[row["step"]] = source["weights"], str(path.parent), file
        self.watch.deal_with(Version(path, source["bytes"], source["modified"]))
        return extra

    def look(self) -> None:
        """See what the run has written, at most every few seconds; called while measuring, too."""
        now = time.monotonic()
        if now - self._last_look < self.options.interval:
            return
        self._last_look = now
        self.run.find()
        self.watch.look()
        self.end.look()
        if now - self._last_beat >= _BEAT:
            self._last_beat = now
            self.beat(ended=False)

    def beat(self, *, ended: bool) -> None:
        """Write the mark, which says whose spectra these are and that somebody is at work."""
        folder = self.run.folder
        mark = Mark(
            run_id=self.run.run_id,
            folder="" if folder is None else os.path.realpath(folder),
            split=self.options.split,
            identity=self._identity,
            ended=ended,
            checkpoints=str(self.watch.folder),
        )
        with atomic_write(self.options.out / MARK) as file:
            file.write(json.dumps(asdict(mark)).encode())
        line = json.dumps({"step": 0, "identity/sidecar": self._identity})
        with atomic_write(self.options.out / "identity_sidecar.jsonl") as file:
            file.write(line.encode() + b"\n")

    # The loop -----------------------------------------------------------------------------------

    def follow(self) -> int:
        """Measure until the run has ended and nothing is left; return the exit code."""
        say(f"following {self.watch.folder}: measuring checkpoints as they appear")
        self.beat(ended=False)
        if self._done:
            self._write_tables()
            say(f"{len(self._done)} measured before")
        self._go_on()
        ending = None
        while True:
            self.look()
            version = self.watch.newest(at_the_end=ending is not None)
            if version is not None:
                self._take(version, at_the_end=ending is not None)
            elif ending is not None:
                break
            elif (ending := self.end.has_come()) is None:
                time.sleep(self.options.interval)
            else:
                left = self.watch.waiting
                say(f"the run has ended: {ending}" + (f"; {_named(left)} to go" if left else ""))
                self._last_look = -_BEAT  # what it wrote last is seen
        return self._told_at_the_end()

    def _go_on(self) -> None:
        """Finish the measurement during which the sidecar was stopped, of the copy it had made."""
        self._copies.mkdir(exist_ok=True)
        about = self._copies / "source.json"
        try:
            found = parse_json(read_bounded(about, 2**16).decode())
            version = Version(Path(found["path"]), int(found["bytes"]), int(found["modified"]))
            saved = read_checkpoint(self._copies / version.path.name, trust=self.options.trust)
        except (ValueError, TypeError, KeyError, OSError):
            self._clear_copies()
            return
        say(f"{version.path.name}: going on with the measurement that was stopped")
        self._measure(saved, version)

    def _take(self, version: Version, *, at_the_end: bool) -> None:
        """Copy a checkpoint and measure it, unless it cannot be read yet, or is gone."""
        copy = self._copies / version.path.name
        self._clear_copies()
        try:
            copy_checkpoint(version.path, copy, trust=self.options.trust)
            if version_of(version.path) != version:
                self._last_look = -_BEAT
                return  # changed under the copy: seen anew at the next look
            saved = read_checkpoint(copy, trust=self.options.trust)
        except FileNotFoundError:
            self._last_look = -_BEAT  # deleted; that is seen and told
            return
        except (ValueError, OSError) as error:
            if at_the_end or self.watch.is_settled(version):
                self._fail(version, error)
            else:
                self.watch.put_off(version)  # half-written, for all that can be known
            return
        with atomic_write(self._copies / "source.json") as file:
            source = {"path": str(version.path), "bytes": version.bytes}
            file.write(json.dumps(source | {"modified": version.modified}).encode())
        self._say_what_is_left(version)
        self._measure(saved, version)

    def _measure(self, saved: Saved, version: Version) -> None:
        """Measure what a copy holds, unless it has been measured under this or another name."""
        self.watch.deal_with(version)
        file = self._file_of(saved, version)
        if file is None:
            self._clear_copies()
            return
        label = version.path.name
        try:
            notes = measure_checkpoint(
                saved, version, file, label, self.cls, self.options, meanwhile=self.look
            )
        except ArgumentError:
            raise  # it would be the same at every other checkpoint
        except Exception as error:  # noqa: BLE001 - the module, the data: all the user's
            self._fail(version, error)
            return
        finally:
            if self.options.device.type == "cuda":
                torch.cuda.empty_cache()
        for note in notes:
            if note not in self._told_notes:  # most are true of every checkpoint
                say(f"{label}: {note}")
        self._told_notes |= set(notes)
        self.measured += 1
        self._clear_copies()
        self._know(file)
        self._write_tables()

    def _file_of(self, saved: Saved, version: Version) -> Path | None:
        """Return where the spectrum of a checkpoint goes, None where it is there already."""
        file: Path = self._spectra / f"{version.path.stem}.npz"
        known = self._done.get(saved.step)
        if known is not None:
            weights, parent, old = known
            if weights == saved.weights:
                return None  # last.ckpt is the same as the one saved before it
            if parent != str(version.path.parent):
                self._fail(version, ValueError(
                    f"step {saved.step} was measured in {parent}, and {self.options.out} is for "
                    "one run. Follow the folder of one run."
                ))  # fmt: skip
                return None
            # The run was resumed from before this step, and has come to other weights.
            say(f"{version.path.name}: step {saved.step} has other weights now, measured anew")
            old.unlink(missing_ok=True)
            file = old
        elif file.exists():  # last.ckpt of another step
            file = file.with_stem(f"{file.stem}-step={saved.step}")
        state = file.with_suffix(".lanczos")
        begun = self._copies / "begun.json"
        now = json.dumps([saved.weights, settings_of(self.options)])
        if not begun.exists() or begun.read_text() != now:
            state.unlink(missing_ok=True)  # of other weights, or with other arguments
        begun.write_text(now)
        return file

    def _clear_copies(self) -> None:
        for path in self._copies.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _fail(self, version: Version, error: Exception) -> None:
        self.watch.deal_with(version)
        self.failed[version.path.name] = why(error)
        say(f"{version.path.name}: not measured: {self.failed[version.path.name]}")

    # What is told -------------------------------------------------------------------------------

    def _say_what_is_left(self, chosen: Version) -> None:
        older = [v for v in self.watch.waiting if v != chosen and v.modified <= chosen.modified]
        left = [v for v in older if v.path not in self._told_left and not is_last(v.path)]
        self._told_left |= {v.path for v in left}
        if left:
            say(
                f"behind the run: {_named(left)} left for when nothing newer is there, "
                f"{chosen.path.name} first"
            )

    def _write_tables(self) -> None:
        for reason_left_out in write_tables(self.options.out).values():
            say(f"left out of the tables: {reason_left_out}")
        self.log.log(self._done, self._identity)

    def _told_at_the_end(self) -> int:
        self._clear_copies()
        if not self._done and not self.failed:
            raise FileNotFoundError(
                f"{self.watch.folder}: no checkpoint was seen before the run was taken to have "
                "ended. Give its folder of checkpoints, or a longer --idle."
            )
        self.log.log(self._done, self._identity)  # where the run came late
        self.beat(ended=True)
        if self.watch.gone:
            names = ", ".join(dict.fromkeys(self.watch.gone))
            say(f"deleted by the run before they could be measured: {names}")
        say(
            f"{self.measured} measured; {self.options.out / 'metrics.csv'} has {len(self._done)} "
            "rows"
        )
        if not self.failed:
            return 0
        named = "; ".join(f"{name}: {text}" for name, text in self.failed.items())
        told = f"{len(self.failed)} could not be measured. {named}"
        if not self._done:
            raise ValueError(told)
        say(f"lightning-hessian: {told}")
        return 1


def _named(versions: list[Version]) -> str:
    names = [version.path.name for version in versions]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""What a sidecar logs to W&B: a run beside the run, in its group, or more rows of the run itself.

The rows have the step axis of `WandbLogger`, so that W&B draws both over the same steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hessian.cli.run_end import Run
from lightning_hessian.cli.spectra_folder import extra_of, say
from lightning_hessian.histories.marks import LOGGED_STEP, Mark
from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.files import load_spectrum
from lightning_hessian.results.outside import reason
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.spectra import encode_spectrum

_SHARED = ("x_primary", "x_update_finish_state", "x_label")
"""Settings of clients in which several processes can write to one run."""


@dataclass(frozen=True)
class _Target:
    """Where the rows go, as `wandb.init` wants it."""

    run_id: str
    entity: str | None
    project: str
    group: str
    mode: str  # online, offline or shared


class WandbLog:
    """Logs what has been measured, each spectrum once; does nothing unless it was asked for."""

    def __init__(self, run: Run, options: argparse.Namespace) -> None:
        self._run, self._options = run, options
        self._wandb: Any = None
        self._logged: set[tuple[int, str]] = set()
        self._last: dict[str, Any] = {}
        self._told = self._given_up = False
        if not options.wandb and options.wandb_shared:
            raise ValueError("--wandb-shared says how --wandb logs. Give --wandb, too.")
        if options.wandb and run.remote is None and run.folder is not None and not run.run_id:
            raise ValueError(
                f"--wandb: {run.folder} is no W&B run. Give --run with its folder, "
                "wandb/offline-run-TIME-ID, or with ENTITY/PROJECT/RUN."
            )

    def log(self, done: Mapping[int, tuple[str, str, Path]], identity: str) -> None:
        """Log the measurements that have not been logged by this process.

        After a restart all are logged again: of equal steps readers take the last.

        Args:
            done: Step to weights, folder of the checkpoint, and file of the spectrum.
            identity: Of the sidecar.
        """
        if not self._options.wandb or self._given_up:
            return
        try:
            if self._wandb is None:
                self._wandb = self._begun(identity)
            if self._wandb is not None:
                self._log(done)
        except Exception as error:  # noqa: BLE001 - whatever a server says, the measuring goes on
            say(
                f"--wandb: no more is logged to W&B ({reason(error)}). Run the command again later."
            )
            self._given_up = True

    def _log(self, done: Mapping[int, tuple[str, str, Path]]) -> None:
        for step in sorted(done):
            weights, _, file = done[step]
            if (step, weights) in self._logged:
                continue
            try:
                row, spectrum = extra_of(file)["row"], load_spectrum(file)
            except (UnreadableFileError, OSError):
                continue  # it is told by the tables
            text = encode_spectrum(spectrum.eigenvalues, spectrum.residuals, spectrum.converged)
            values = {key: value for key, value in row.items() if key.startswith("hessian/")}
            for key in values:
                self._wandb.define_metric(key, step_metric=STEP)
            at = int(row.get(LOGGED_STEP, step))
            self._wandb.log({STEP: at, **values, "spectra/hessian": text})
            self._logged.add((step, weights))
            if step == max(done):
                # The newest come first, and W&B's summary would show the oldest.
                self._last = values
        self._wandb.summary.update(self._last)

    def close(self) -> None:
        """End the run beside the run; the run itself, where rows were added to it, goes on."""
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # noqa: BLE001 - as above
                say(f"--wandb: {reason(error)}")
            self._wandb = None

    def _begun(self, identity: str) -> Any:
        """Return the W&B run to log to, None while the run itself is not there yet."""
        import wandb

        target = self._target()
        if target is None:
            if not self._told:
                say("--wandb: the run is not there yet; its rows follow when it is")
                self._told = True
            return None
        begin: dict[str, Any] = {
            "entity": target.entity, "project": target.project, "dir": str(self._options.out),
        }  # fmt: skip
        # The run has a terminal and a machine of its own: neither our text nor our load is its.
        quiet: dict[str, Any] = {"console": "off", "x_disable_stats": True}
        if target.mode == "shared":
            settings = wandb.Settings(
                mode="shared",
                x_primary=False,
                x_label="hessian-sidecar",
                x_update_finish_state=False,
                **quiet,
            )
            found = wandb.init(id=target.run_id, settings=settings, **begin)
        else:
            settings = wandb.Settings(mode=target.mode, **quiet)
            mark = Mark(run_id=target.run_id, split=self._options.split)
            found = wandb.init(
                id=f"{target.run_id}-hessian",
                name=f"{target.run_id} hessian",
                group=target.group,
                job_type="hessian-sidecar",
                config=mark.config(),
                resume="allow",
                settings=settings,
                **begin,
            )
        found.define_metric(STEP)
        found.log({STEP: 0, "identity/sidecar": identity})
        return found

    def _target(self) -> _Target | None:
        remote = self._run.remote
        if remote is not None and remote.run_id is not None:
            entity, _, project = remote.project.partition("/")
            mode = "shared" if self._options.wandb_shared and _can_share() else "online"
            group = _group_on_the_server(f"{remote.project}/{remote.run_id}")
            return _Target(remote.run_id, entity, project, group or remote.run_id, mode)
        found = self._run.offline()
        if found is None:
            return None
        if self._options.wandb_shared:
            say("--wandb-shared: an offline run cannot be shared; a run beside it, in its group")
        return _Target(found.run_id, None, found.project, found.group or found.run_id, "offline")


def _can_share() -> bool:
    """Whether this client can write to a run of another process; says so where it cannot."""
    import wandb

    known = set(wandb.Settings.model_fields) if hasattr(wandb.Settings, "model_fields") else set()
    if known.issuperset(_SHARED):
        return True
    say(f"--wandb-shared: wandb {wandb.__version__} has no shared mode; a run in the same group")
    return False


def _group_on_the_server(path: str) -> str:
    import wandb

    try:
        return str(wandb.Api(timeout=30).run(path).group or "")
    except Exception as error:  # noqa: BLE001 - without an answer the group is the run's own name
        say(f"--wandb: the group of {path} is not known ({reason(error)})")
        return ""

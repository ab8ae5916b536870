"""What loggers get of a measurement: statistics at once, the rest when all metrics are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_hessian.callbacks.compat import tell
from lightning_hessian.callbacks.guard import Guard
from lightning_hessian.callbacks.hyperparameters import hyperparameters
from lightning_hessian.callbacks.pairing import GAP
from lightning_hessian.callbacks.surroundings import validation_step
from lightning_hessian.linear.rng import preserved_rng
from lightning_hessian.statistics.correlation import Correlation
from lightning_hessian.tracking.history import correlation_scalars
from lightning_hessian.tracking.loggers import adapter, own_folder
from lightning_hessian.tracking.metrics_file import own_metrics
from lightning_hessian.tracking.panels import Drawings, Panels


class HandOver:
    """Gives statistics, correlations, spectra and figures to the loggers of a Trainer.

    What it is given as a function is called under the guard: it is the callback's or the user's,
    and may raise. ``correlation_prefix`` tells the correlations of siblings apart.
    """

    def __init__(self, panels: Panels, guard: Guard, correlation_prefix: str) -> None:
        self._panels = panels
        self._attempt = guard.attempt
        self._correlation_prefix = correlation_prefix

    def log(self, trainer: Any, pl_module: Any, scalars: Mapping[str, float]) -> None:
        """Log the statistics in the row of the validation metrics; all ranks call it.

        It is called at the end of the validation epoch, while ``log_dict`` is open. A name without
        a slash gets the prefix of the measurement.
        """
        logged = self._keys(scalars)
        if trainer.is_global_zero:
            self._panels.define(trainer.loggers, logged)
        pl_module.log_dict(
            logged,
            on_step=False,
            on_epoch=True,
            # Equal on all ranks (broadcast): reducing changes nothing, and avoids a warning.
            sync_dist=trainer.world_size > 1,
        )
        if trainer.is_global_zero:
            self._write(trainer, validation_step(trainer), logged)

    def log_hyperparameters(
        self, trainer: Any, pl_module: Any, arguments: Mapping[str, Any]
    ) -> None:
        """Log the arguments of the callback, and what it measures; before training.

        They are all under one name of our own, ``hessian_callback``, so that nothing of the user's
        is overwritten, and no logger refuses a value of the user's for one of ours. Lightning logs
        those of the module after this, so that loggers that write them once have both.
        """
        if not trainer.is_global_zero or not trainer.loggers:
            return
        what = "reading the hyperparameters"
        values = self._attempt(what, hyperparameters, arguments, trainer, pl_module)
        if values is None:
            return
        found = {f"{self._panels.prefix}_callback": values}
        with preserved_rng():
            for logger in trainer.loggers:
                what = f"logging hyperparameters to {type(logger).__name__}"
                self._attempt(what, adapter(logger).hyperparameters, logger, found)

    def log_aside(
        self,
        trainer: Any,
        step: int,
        scalars: Mapping[str, float],
        metrics: Mapping[str, Any],
    ) -> None:
        """Log statistics between batches, or after training has ended.

        Args:
            trainer: On rank zero.
            step: Of the row in which loggers have the batch, or the validation, before.
            scalars: By name, as in `log`.
            metrics: Of the validation that they belong to, to stand in the same row.
        """
        logged = self._keys(scalars)
        self._panels.define(trainer.loggers, logged)
        row = {name: float(value) for name, value in metrics.items()} | logged
        for logger in trainer.loggers:
            what = f"logging the statistics to {type(logger).__name__}"
            self._attempt(what, logger.log_metrics, row, step)
        self._write(trainer, step, logged)
        self._write(trainer, step, {}, metrics)

    def _write(
        self,
        trainer: Any,
        step: int,
        values: Mapping[str, float],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write into the table of a fit that has no logger; say once where it is.

        Of the ``metrics`` those are left out that are statistics: Lightning keeps them in float32,
        and those of measurements before, too.
        """
        if trainer.loggers or trainer.state.fn != "fit":
            return
        table = self._attempt("finding a folder", own_metrics, trainer)
        if table is None:
            return
        if metrics is None:
            table.statistics.update(values)
        known = table.statistics
        found = {name: float(v) for name, v in (metrics or {}).items() if name not in known}
        is_new = not table.path.exists()
        self._panels.write_row(table, step, {**found, **values})
        if is_new and table.path.exists():
            tell(
                f"Without a logger, the statistics go to {table.path}: "
                f"`lightning-hessian report {table.path.parent}` reads them."
            )

    def _keys(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Return statistics by logged name."""
        return {
            name if "/" in name else f"{self._panels.prefix}/{name}": value
            for name, value in scalars.items()
        }

    def pair(
        self,
        trainer: Any,
        row: Mapping[str, float],
        correlations: Callable[[], Mapping[tuple[str, str], Correlation]],
        metrics: Mapping[str, Any],
    ) -> None:
        """Log the correlations of all measurements, and the gap of the last, ``row``.

        It is called on rank zero once the metrics of the same validation were logged; ``metrics``
        are these, for the table of a run without logger.
        """
        found = self._attempt("correlating", correlations) or {}
        scalars = correlation_scalars(found, self._correlation_prefix)
        if GAP in row and self._panels.prefix:
            scalars[f"{self._panels.prefix}/{GAP}"] = row[GAP]
        if scalars:
            self._panels.define(trainer.loggers, scalars)
        for logger in trainer.loggers if scalars else ():
            what = f"logging correlations to {type(logger).__name__}"
            self._attempt(what, logger.log_metrics, scalars, int(row["step"]))
        if not trainer.loggers:
            self._write(trainer, int(row["step"]), {"epoch": row["epoch"], **scalars}, metrics)

    def add_spectrum(
        self, trainer: Any, step: int, identity: str, code: Callable[[], str | None]
    ) -> None:
        """Give the spectrum of a measurement to the loggers, and tell them of which fit it is.

        ``code`` returns the spectrum as a text, or None where there is none.
        """
        folder = self._attempt("finding a folder", own_folder, trainer)
        self._panels.add_identity(identity, step, trainer.loggers, folder)
        text = self._attempt("encoding the spectrum", code)
        if text is not None:
            self._panels.add_spectrum(text, step, trainer.loggers, folder)

    def draw(
        self,
        trainer: Any,
        num_measurements: int,
        drawings: Callable[[], Drawings],
        correlations: Callable[[], Drawings],
        last: bool,
    ) -> float:
        """Draw the figures where they are due, and return the seconds that it took.

        ``drawings`` are of the last measurement, ``correlations`` of all; ``last`` says that
        training has ended, and what was not drawn is due.
        """
        before = self._panels.seconds
        if self._panels.is_due(num_measurements, last):
            paired: Drawings = self._attempt("correlating", correlations) or {}
            measured: Drawings = self._attempt("drawing figures", drawings) or {}
            folder = self._attempt("finding a folder", own_folder, trainer)
            self._panels.draw({**measured, **paired}, trainer.loggers, folder)
        return self._panels.seconds - before

"""What every measuring callback shares: schedule, history, hand-over to the loggers, failures."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

from lightning_hessian.callbacks.compat import Callback
from lightning_hessian.callbacks.probe_data import ProbeData, check_data, probe_batches
from lightning_hessian.callbacks.schedule import EveryNValidations, Schedule, TimeBudget
from lightning_hessian.callbacks.surroundings import (
    log_step,
    refuse_surroundings,
    trainer_ranks,
    unknown_metric,
)
from lightning_hessian.distributed import ALONE, RankError
from lightning_hessian.operators.fsdp1 import whole
from lightning_hessian.probe.copies import StatefulDataError
from lightning_hessian.results import MeasurementError
from lightning_hessian.statistics.correlation import Correlation
from lightning_hessian.tracking.drawings import correlation_drawings
from lightning_hessian.tracking.history import History, correlation_scalars
from lightning_hessian.tracking.loggers import own_folder
from lightning_hessian.tracking.panels import Drawings, Panels
from lightning_hessian.tracking.progress import Progress, summary_line

_COSTLY_SHARE = 0.2  # of the training time since the last measurement
_COSTLY_SECONDS = 1.0  # below which no cost is worth a word


class MeasurementCallback(Callback):
    """Measures at validations, logs in the row of the validation metrics, correlates with them.

    A subclass says what is measured (`measure`), what is correlated (``correlated``) and under
    which prefix it is logged (``prefix``, ``correlation_prefix``).

    Two hooks share the work. At ``on_validation_epoch_end`` the statistics are measured and
    logged, so that they stand in the same row as the validation metrics and ``ModelCheckpoint``
    can monitor them. Only at ``on_validation_end`` are all metrics of this validation known: there
    they are paired and correlated, and figures are drawn, outside the time of the measurement.
    """

    prefix: str
    correlated: tuple[str, ...]
    correlation_prefix = ""  # tells the correlations of siblings apart
    cost_arguments = "num_eigenvalues, num_batches"  # what to lower where a measurement takes long
    work = ("HVPs", "num_hvps")  # what the progress bar counts, and the statistic that tells it

    def __init__(
        self,
        *,
        monitor: str | Sequence[str],
        every_n_validations: int | Schedule,
        data: ProbeData,
        num_batches: int,
        time_budget: float | None,
        during_validate: bool,
        on_error: str,
        seed: int,
        figures: int | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error={on_error!r} is neither 'warn' nor 'raise'.")
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches}; at least one probe batch is needed.")
        check_data(data)
        self.monitors = (monitor,) if isinstance(monitor, str) else tuple(monitor)
        self.schedule: Schedule = (
            EveryNValidations(every_n_validations)
            if isinstance(every_n_validations, int)
            else every_n_validations
        )
        if not isinstance(self.schedule, Schedule):
            raise ValueError(
                f"every_n_validations={every_n_validations!r} is neither a number nor a schedule "
                "(an object with is_due(validation, step, last_step))."
            )
        self.data = data
        self.num_batches = num_batches
        self.during_validate = during_validate
        self.on_error = on_error
        self.seed = seed
        self.figures = figures
        self.progress = progress
        self._panels = Panels(self.prefix, figures)
        self._progress: Progress | None = None  # of the measurement under way
        self._time_budget = time_budget
        self._budget = TimeBudget(time_budget)
        self._history = History()
        self._num_validations = 0
        self._batches: Sequence[Any] | None = None
        self._ranks = ALONE
        self._pending: dict[str, float] | None = None
        self._clock: float | None = None
        self._metrics: dict[str, Any] = {}  # those of the validation before
        self._enabled = True
        self._warned: set[str] = set()

    # What a subclass gives ---------------------------------------------------------------------

    def check(self, pl_module: Any) -> None:
        """Raises ValueError where the arguments do not fit the module; called before training."""
        raise NotImplementedError

    def measure(
        self, pl_module: Any, batches: Sequence[Any], max_seconds: float | None
    ) -> tuple[dict[str, float], list[str]]:
        """Returns the statistics by name, and a sentence for each that is absent.

        All ranks call it together; those of ``self._ranks.group`` share the work.
        """
        raise NotImplementedError

    def expected_work(self) -> int:
        """Returns about how many products (or gradients) the first measurement takes; 0 unknown."""
        return 0

    def spectrum_code(self) -> str | None:
        """Returns the spectrum of the last measurement as a text for the history, if it has one."""
        return None

    def drawings(self) -> Drawings:
        """Returns what draws the figures of the last measurement, by name."""
        return {}

    # What a user reads -------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, float]]:
        """One dict for each measurement, in float64: step, epoch, statistics, monitored metrics."""
        return [dict(row) for row in self._history.rows]

    def correlations(self) -> dict[tuple[str, str], Correlation]:
        """Correlation of each (statistic, monitor) over the measurements, from 4 points on."""
        return self._history.correlations(self.correlated, self.monitors)

    # Hooks -------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells callbacks with different data apart in a checkpoint."""
        data = self.data if isinstance(self.data, str) else type(self.data).__name__
        return self._generate_state_key(data=data, monitor=list(self.monitors))

    def state_dict(self) -> dict[str, Any]:
        """Returns the history, its spectra and the count of validations."""
        return {
            "history": self.history,
            "num_validations": self._num_validations,
            **self._panels.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the history of a checkpoint."""
        self._history = History(state_dict["history"])
        self._num_validations = state_dict["num_validations"]
        self._panels.load_state_dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot work, before anything is trained."""
        self._enabled = stage == "fit" or (stage == "validate" and self.during_validate)
        if stage == "fit":
            self._batches = None
            self._metrics = {}
        self._budget = TimeBudget(self._time_budget)
        self._clock = None
        if not self._enabled:
            return
        if trainer.barebones:
            self._enabled = False
            warnings.warn(
                f"{type(self).__name__} measures nothing under Trainer(barebones=True), which "
                "logs nothing.",
                stacklevel=2,
            )
        refuse_surroundings(self, trainer)
        names = [type(other).__name__ for other in trainer.callbacks]
        if "WeightAveraging" in names or "EMAWeightAveraging" in names:
            self._warn_once(
                "averaging",
                "Averaged weights are swapped in for validation: put this callback before the "
                "averaging one to measure them, after it to measure the trained weights.",
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks the arguments against the module, which is complete now."""
        if self._enabled:
            with whole(trainer.strategy.model):
                self.check(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks the same where there is no fit."""
        if self._enabled and trainer.state.fn == "validate":
            with whole(trainer.strategy.model):
                self.check(pl_module)
            if self._batches is None:
                self._draw_probe(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draws the probe batches before anything is trained, and starts the clock of the budget.

        Raises:
            StatefulDataError: Reading the data would change what training reads.
        """
        if self._enabled:
            self._draw_probe(trainer, pl_module)
        self._clock = time.monotonic()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures and logs, when it is due."""
        self._pending = None
        if not self._enabled or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and not self._is_due(trainer):
            return
        started = time.monotonic()
        if self._clock is not None:
            self._budget.trained(started - self._clock)
        if trainer.strategy.broadcast(self._budget.allows()):
            self._pending = self._measure_or_report(trainer, pl_module)
            self._note_cost(time.monotonic() - started)
        self._clock = time.monotonic()
        if self._pending is not None:
            logged = {
                name if "/" in name else f"{self.prefix}/{name}": value
                for name, value in self._pending.items()
            }
            if trainer.is_global_zero:
                self._panels.define(trainer.loggers, logged)
            pl_module.log_dict(
                logged,
                on_step=False,
                on_epoch=True,
                # Equal on all ranks (broadcast): reducing changes nothing, and avoids a warning.
                sync_dist=trainer.world_size > 1,
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Pairs the measurement with the metrics of the same validation, and correlates."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        before, self._metrics = self._metrics, dict(trainer.callback_metrics)
        if self._pending is None:
            return
        monitored = {}
        for name in self.monitors:
            if name not in self._metrics:
                self._warn_once(name, unknown_metric(name, list(self._metrics)))
            elif self._metrics[name] is not before.get(name):  # else it is an older one, kept
                monitored[name] = float(self._metrics[name])
        self._history.add(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                **self._pending,
                **monitored,
            }
        )
        self._pending = None
        if trainer.is_global_zero:
            self._hand_over(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draws the last measurement, unless it was drawn when it was made."""
        if self._enabled and trainer.is_global_zero and self._history.rows:
            self._draw(trainer, last=True)

    # Inside ------------------------------------------------------------------------------------

    def _hand_over(self, trainer: Any) -> None:
        """Gives the loggers what is known only now: correlations, the spectrum, figures."""
        scalars = correlation_scalars(self.correlations(), self.correlation_prefix)
        if scalars:
            self._panels.define(trainer.loggers, scalars)
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=log_step(trainer))
        code = self.spectrum_code()
        if code is not None:
            step = int(self._history.rows[-1]["step"])
            self._panels.add_spectrum(
                code, step, log_step(trainer), trainer.loggers, own_folder(trainer)
            )
        self._draw(trainer)

    def _draw(self, trainer: Any, last: bool = False) -> None:
        rows = self._history.rows
        correlations = correlation_drawings(rows, self.correlated, self.monitors)
        before = self._panels.seconds
        self._panels.draw(
            {**self.drawings(), **correlations},
            len(rows),
            log_step(trainer),
            trainer.loggers,
            own_folder(trainer),
            last=last,
        )
        if self._clock is not None:  # drawing is no training that would earn measurements
            self._clock += self._panels.seconds - before

    def _draw_probe(self, trainer: Any, pl_module: Any) -> None:
        """Draws the probe batches; a failure is met again, and told, at the first measurement.

        Raises:
            StatefulDataError: Reading the data would change what training reads; on all ranks.
        """
        self._ranks = trainer_ranks(trainer, pl_module)
        failure: Exception | None = None
        try:
            batches = probe_batches(trainer, self.data, self.num_batches, self.seed)
        except Exception as error:  # noqa: BLE001 - told when a measurement needs the data
            failure = error
        refused = isinstance(failure, StatefulDataError)
        if self._ranks.any(refused):
            if self._ranks.world > 1:
                self._ranks.fail(failure if refused else None)
            assert failure is not None
            raise failure
        self._batches = None if self._ranks.any(failure is not None) else batches

    def _is_due(self, trainer: Any) -> bool:
        self._num_validations += 1
        rows = self._history.rows
        last_step = int(rows[-1]["step"]) if rows else None
        return self.schedule.is_due(self._num_validations, trainer.global_step, last_step)

    def _measure_or_report(self, trainer: Any, pl_module: Any) -> dict[str, float] | None:
        """Returns rank zero's statistics on all ranks, or None where the measurement failed."""
        failure: Exception | None = None
        scalars: dict[str, float] = {}
        seconds = trainer.strategy.broadcast(self._budget.max_seconds())
        limit = seconds if math.isfinite(seconds) else None
        self._ranks = trainer_ranks(trainer, pl_module)
        try:
            with self._ranks.together():
                if self._batches is None:
                    self._batches = probe_batches(trainer, self.data, self.num_batches, self.seed)
            self._progress = self._new_progress(trainer)
            with whole(trainer.strategy.model):
                scalars, absent = self.measure(pl_module, self._batches, limit)
            self._progress.close(summary_line(self.prefix, trainer.global_step, scalars))
            for reason in absent if trainer.is_global_zero else ():
                warnings.warn(f"Step {trainer.global_step}: {reason}", stacklevel=2)
        except Exception as error:  # noqa: BLE001 - training must go on; it is reported below
            failure = error
            if self._progress is not None:
                self._progress.close()
        if trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            return trainer.strategy.broadcast(scalars)
        if self._ranks.world > 1 and not isinstance(failure, RankError):
            failure = self._named(failure)
        assert failure is not None
        if self.on_error == "raise":
            raise failure
        if trainer.is_global_zero:
            warnings.warn(
                f"No {self.prefix} statistics at step {trainer.global_step}, training goes on: "
                f"{_sentence(failure)}",
                stacklevel=2,
            )
        return None

    def _named(self, failure: Exception | None) -> Exception:
        """Returns a failure that came unagreed as one that names the rank, the same on all."""
        try:
            self._ranks.fail(failure)
        except RankError as agreed:
            return agreed

    def _new_progress(self, trainer: Any) -> Progress:
        shown = self.progress and trainer.is_global_zero
        unit, statistic = self.work
        rows = self._history.rows
        return Progress(
            trainer.progress_bar_callback if shown else None,
            self.prefix,
            unit=unit,
            wanted=getattr(self, "num_eigenvalues", None),
            expected=int(rows[-1].get(statistic, 0)) if rows else self.expected_work(),
        )

    def _note_cost(self, seconds: float) -> None:
        trained = self._budget.since_last
        self._budget.measured(seconds)
        costly = seconds > max(_COSTLY_SECONDS, _COSTLY_SHARE * trained)
        if self._time_budget is None and self._clock is not None and costly:
            self._warn_once(
                "cost",
                f"The measurement took {seconds:.1f} s after {trained:.1f} s of training. "
                "Give time_budget=0.05, raise every_n_validations, or lower "
                f"{self.cost_arguments} or the selected parameters.",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned and self._ranks.rank == 0:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)


def _sentence(error: Exception) -> str:
    text = str(error).strip() or "no message"
    if isinstance(error, (MeasurementError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"

"""What every measuring callback shares: schedule, history, hand-over to the loggers, failures."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from lightning_hessian.callbacks.account import Account
from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.callbacks.compat import Callback
from lightning_hessian.callbacks.handover import HandOver
from lightning_hessian.callbacks.measuring import Measuring
from lightning_hessian.callbacks.pairing import Pairs, incomparable
from lightning_hessian.callbacks.probe_data import ProbeData, early_batches
from lightning_hessian.callbacks.schedule import Schedule
from lightning_hessian.callbacks.state import Progressed
from lightning_hessian.callbacks.steps import StepCount
from lightning_hessian.callbacks.surroundings import (
    AVERAGED,
    averages_weights,
    refuse_surroundings,
    trained_step,
    trainer_ranks,
    validation_step,
    without_validation,
)
from lightning_hessian.callbacks.updates import RecordsUpdates
from lightning_hessian.linear.ranks import ALONE
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Instrument
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.results.arguments import checked
from lightning_hessian.statistics.correlation import Correlation
from lightning_hessian.tracking.drawings import correlation_drawings
from lightning_hessian.tracking.history import History
from lightning_hessian.tracking.panels import Drawings, Panels


class MeasurementCallback(RecordsUpdates, Measuring, Callback):
    """Measures at validations, logs in the row of the validation metrics, correlates with them.

    A subclass says what is measured (`measure`), what is correlated (``correlated``) and under
    which prefix it is logged (``prefix``, ``correlation_prefix``).

    Two hooks share the work. At ``on_validation_epoch_end`` the statistics are measured and
    logged, so that they stand in the same row as the validation metrics and ``ModelCheckpoint``
    can monitor them. Only at ``on_validation_end`` are all metrics of this validation known: there
    they are paired and correlated, and figures are drawn, outside the time of the measurement.
    """

    correlated: tuple[str, ...]
    correlation_prefix = ""  # tells the correlations of siblings apart
    _arguments: Mapping[str, Any] = MappingProxyType({})  # for the hyperparameters of the run

    @checked(CALLBACK_RULES)
    def __init__(
        self,
        *,
        monitor: str | Sequence[str],
        every_n_validations: int | Schedule,
        data: ProbeData,
        num_batches: int,
        time_budget: float | Budget | None,
        on_error: str,
        seed: int,
        figures: int | None = None,
        progress: bool = False,
        instruments: Sequence[Instrument] = (),
    ) -> None:
        assert isinstance(time_budget, Budget)  # by its rule
        super().__init__(
            data=data,
            num_batches=num_batches,
            time_budget=time_budget,
            on_error=on_error,
            seed=seed,
            progress=progress,
            instruments=instruments,
        )
        self.monitors = tuple(dict.fromkeys(monitor))  # by its rule, of texts
        assert not isinstance(every_n_validations, int)  # by its rule
        self.schedule = every_n_validations
        self.figures = figures
        self._panels = Panels(self.prefix, figures)
        self._history = History()
        self._identity = uuid.uuid4().hex  # drawn by the system: no seed of training moves
        self._num_validations = 0
        self._last_step: int | None = None  # optimizer steps before the last whole measurement
        self._pending: dict[str, float] | None = None
        self._clock: float | None = None
        self._pairs = Pairs(self.monitors, isinstance(data, str) and data == "train")
        self._handover = HandOver(self._panels, self._guard, self.correlation_prefix)
        self._enabled = True
        self._steps = StepCount(self.schedule)

    # What a subclass gives ---------------------------------------------------------------------

    def check_data(self, trainer: Any) -> None:
        """Raise ArgumentError where the arguments do not fit the data; called before training."""

    def spectrum_code(self) -> str | None:
        """Return the spectrum of the last measurement as a text for the history, if it has one."""
        return None

    def drawings(self) -> Drawings:
        """Return what draws the figures of the last measurement, by name."""
        return {}

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take in the statistics of a measurement, or of one between whole measurements."""

    # What a user reads -------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, float]]:
        """One dict for each measurement, in float64: step, epoch, statistics, monitored metrics.

        The step is that of the loggers' row: n - 1 after n optimizer steps.
        """
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
        """Return the history, its spectra and the count of validations."""
        return {
            "history": self.history,
            "num_validations": self._num_validations,
            "last_step": self._last_step,
            "identity": self._identity,
            "account": self._budgeting.account.state_dict(),
            **self._panels.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint; with a new one where it is damaged."""
        self._guard.attempt("reading the history of the checkpoint", self._load, state_dict)
        self._guard.settle(ALONE)

    def _load(self, state_dict: dict[str, Any]) -> None:
        found = Progressed.checked(state_dict, self._identity)
        account = Account.checked(self.time_budget, state_dict["account"])
        self._panels.load_state_dict(state_dict)
        self._budgeting.account = account
        self._history, self._num_validations = found.history, found.num_validations
        self._last_step, self._identity = found.last_step, found.identity

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot work, before anything is trained."""
        self._enabled = stage == "fit" or (
            stage == "validate" and getattr(self.schedule, "during_validate", False)
        )
        if stage == "fit":
            self._identity = uuid.uuid4().hex  # that of a checkpoint is loaded after this
            self._batches = None
            self._pairs.forget()
            self._budgeting.begin()
        self._guard.speaks = trainer.is_global_zero
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
        if stage == "fit" and not trainer.enable_validation and not self._steps.by_steps:
            self._warn_once("no validation", without_validation(type(self).__name__))
        if averages_weights(trainer):
            self._warn_once("averaging", AVERAGED)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the arguments against the module, which is complete now, and log them."""
        if self._enabled:
            with whole(trainer.strategy.model):
                self.check(pl_module)
                self._handover.log_hyperparameters(trainer, pl_module, self._arguments)
            self._guard.settle(trainer_ranks(trainer, pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the same where there is no fit."""
        if self._enabled and trainer.state.fn == "validate":
            with whole(trainer.strategy.model):
                self.check(pl_module)
            if self._batches is None:
                self._draw_probe(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draws the probe batches before anything is trained, and starts the clock of the budget.

        Raises:
            ArgumentError: Arguments that do not fit the loaders, which are there now.
            StatefulDataError: Reading the data would change what training reads.
        """
        if self._enabled:
            self.check_data(trainer)
            self._draw_probe(trainer, pl_module)
        self._steps.begin(trainer.global_step)
        self._clock = time.monotonic()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure what is due by steps, when a validation after the last of them is over."""
        if not self._enabled:
            return
        few, whole_one = self._steps.due(trainer)
        if few or whole_one:
            self._measure_at_step(trainer, pl_module, few, whole_one)
        if self._update.seen or self._steps.batches_to_step(trainer, pl_module) == 1:
            self._update.forget()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures and logs, when it is due and the budget pays for it."""
        self._pending = None
        if not self._enabled or trainer.sanity_checking:
            return
        self._step = validation_step(trainer)
        started = time.monotonic()
        if self._clock is not None:
            self._budgeting.account.earn(started - self._clock)
        fitting = trainer.state.fn == "fit"
        if not fitting or self._budgeting.may_measure(trainer, self._is_due(trainer)):
            self._pending = self._measure_or_report(trainer, pl_module)
        logged = self._pending
        if logged is None and self._few and self._budgeting.affords_few(trainer):
            logged = self._few_or_report(trainer, pl_module)  # these make no row of the history
        self._clock = time.monotonic()
        self._update.seen = True
        if logged is not None:
            self._note_measured(trainer, logged)
            self._guard.attempt(
                "logging the statistics", self._handover.log, trainer, pl_module, logged
            )
            self._guard.settle(self._ranks)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Pairs the measurement with the metrics of the same validation, and correlates."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        fresh = self._guard.attempt("reading the metrics", self._pairs.see, trainer)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._pair(trainer, pending, fresh or {}, trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last validation where it was not; draw; say what was skipped."""
        if not self._enabled:
            return
        self._catch_up(trainer, pl_module)
        self._update.forget()
        if self._history.rows:
            if trainer.is_global_zero:
                self._guard.attempt("drawing figures", self._draw, trainer, True)
            self._guard.settle(self._ranks)
        self._budgeting.summarize()

    # Inside ------------------------------------------------------------------------------------

    def _catch_up(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last validation of a run whose end nobody foresaw; say so where it is late.

        Its row is logged once more with the metrics of that validation, since the loggers have
        closed it.
        """
        by_steps = self._steps.whole_by_steps(trainer)
        if by_steps:
            if trainer.global_step in (0, self._last_step):
                return
            self._step = trained_step(trainer)
            wanted = self._budgeting.ends_by_steps(trainer)
        else:
            wanted = self._budgeting.catches_up(trainer)
        if not wanted:
            return
        pending = self._measure_or_report(trainer, pl_module)
        self._budgeting.caught_up(pending is not None)
        if pending is None:
            return
        self._note_measured(trainer, pending)
        if by_steps:
            self._log_aside(trainer, pending, {})
            self._pair_at_step(trainer, pending)
            return
        self._log_aside(trainer, pending, self._pairs.latest())
        self._pair(trainer, pending, self._pairs.latest(), self._budgeting.epoch)

    def _measure_at_step(self, trainer: Any, pl_module: Any, few: bool, whole_one: bool) -> None:
        """Measure between two batches what is due there and paid for, and log it."""
        self._step = trained_step(trainer)
        started = time.monotonic()
        if self._clock is not None:
            self._budgeting.account.earn(started - self._clock)
        pending = None
        if whole_one and self._budgeting.may_measure(trainer, True):
            pending = self._measure_or_report(trainer, pl_module)
        logged = pending
        if logged is None and few:
            if self._few is None:
                self._learn_few(trainer, pl_module)
            if self._few and self._budgeting.affords_few(trainer, by_steps=True):
                logged = self._few_or_report(trainer, pl_module)
        self._clock = time.monotonic()
        if logged is None:
            return
        self._note_measured(trainer, logged)
        self._log_aside(trainer, logged, {})
        if pending is not None:
            self._pair_at_step(trainer, pending)

    def _note_measured(self, trainer: Any, scalars: Mapping[str, float]) -> None:
        self._steps.measured = trainer.global_step
        self.note(self._step, scalars)
        self._update.forget()

    def _log_aside(
        self, trainer: Any, scalars: Mapping[str, float], metrics: Mapping[str, Any]
    ) -> None:
        """Log in a row that Lightning does not write."""
        if trainer.is_global_zero:
            self._guard.attempt(
                "logging the statistics",
                self._handover.log_aside, trainer, self._step, scalars, metrics,
            )  # fmt: skip
        self._guard.settle(self._ranks)

    def _pair_at_step(self, trainer: Any, pending: Mapping[str, float]) -> None:
        """Pair a measurement that no validation belongs to with the metrics logged since."""
        fresh = self._guard.attempt("reading the metrics", self._pairs.see, trainer)
        self._pair(trainer, pending, fresh or {}, self._steps.epoch)

    def _pair(
        self, trainer: Any, pending: Mapping[str, float], fresh: Mapping[str, Any], epoch: int
    ) -> None:
        """Remember a measurement with the metrics of its validation, and hand it over."""
        found = self._guard.attempt("pairing", self._pairs.of, fresh, pending)
        monitored: dict[str, float] = found[0] if found else {}
        missing: dict[str, str] = found[1] if found else {}
        self._last_step = trainer.global_step
        place = {"step": self._step, "epoch": epoch}
        self._history.add({**place, **pending, **monitored})
        for topic, reason in {**missing, **incomparable(self._history.rows)}.items():
            self._warn_once(topic, reason)
        if trainer.is_global_zero:
            self._guard.attempt("handing over the results", self._hand_over, trainer, fresh)
        self._guard.settle(self._ranks)

    def _hand_over(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        """Give the loggers what is known only now: correlations, the spectrum, figures."""
        row = self._history.rows[-1]
        self._handover.pair(trainer, row, self.correlations, metrics)
        self._handover.add_spectrum(trainer, int(row["step"]), self._identity, self.spectrum_code)
        self._draw(trainer)

    def _draw(self, trainer: Any, last: bool = False) -> None:
        rows = self._history.rows
        paired = partial(correlation_drawings, rows, self.correlated, self.monitors)
        seconds = self._handover.draw(trainer, len(rows), self.drawings, paired, last)
        if self._clock is not None:  # drawing is no training that would earn measurements
            self._clock += seconds
            self._budgeting.account.pay(seconds)

    def _draw_probe(self, trainer: Any, pl_module: Any) -> None:
        self._ranks = trainer_ranks(trainer, pl_module)
        self._batches = early_batches(trainer, self.data, self.num_batches, self.seed, self._ranks)

    def _is_due(self, trainer: Any) -> bool:
        """Return what rank zero's schedule says, on all ranks; False where that fails."""
        self._num_validations += 1

        def ask() -> bool:
            step = trainer.global_step
            return bool(self.schedule.is_due(self._num_validations, step, self._last_step))

        due = bool(self._guard.attempt("the schedule", ask))
        self._guard.settle(self._ranks)
        found: bool = trainer.strategy.broadcast(due)
        return found

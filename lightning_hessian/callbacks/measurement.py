"""What every measuring callback shares: schedule, history, hand-over to the loggers, failures."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.callbacks.budgeting import Budgeting
from lightning_hessian.callbacks.compat import Callback
from lightning_hessian.callbacks.guard import Guard, named, sentence
from lightning_hessian.callbacks.handover import HandOver
from lightning_hessian.callbacks.instruments import measured
from lightning_hessian.callbacks.pairing import Pairs, incomparable
from lightning_hessian.callbacks.probe_data import ProbeData, early_batches, probe_batches
from lightning_hessian.callbacks.schedule import Schedule
from lightning_hessian.callbacks.surroundings import (
    AVERAGED,
    averages_weights,
    refuse_surroundings,
    trainer_ranks,
)
from lightning_hessian.linear.ranks import ALONE, RankError
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Instrument, Record
from lightning_hessian.measure.session import Knowledge, Session
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.results import MeasurementError
from lightning_hessian.results.arguments import checked
from lightning_hessian.statistics.correlation import Correlation
from lightning_hessian.tracking.drawings import correlation_drawings
from lightning_hessian.tracking.history import History
from lightning_hessian.tracking.panels import Drawings, Panels
from lightning_hessian.tracking.progress import Progress, summary_line

_COSTLY_SHARE = 0.2  # of the training time since the last measurement
_COSTLY_SECONDS = 1.0  # below which no cost is worth a word
_ADVICE = {
    "spectrum": "num_eigenvalues ({num_eigenvalues})",
    "layers": "the number of layers",
    "blocks": "the number of blocks",
    "gradients": "num_gradients ({num_gradients})",
}
"""By the instrument that costs most: what to lower."""


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
    work = ("HVPs", "num_hvps")  # what the progress bar counts, and the statistic that tells it

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
        super().__init__()
        self.monitors = tuple(dict.fromkeys(monitor))  # by its rule, of texts
        assert not isinstance(every_n_validations, int)  # by its rule
        self.schedule = every_n_validations
        self.data = data
        self.num_batches = num_batches
        assert isinstance(time_budget, Budget)  # by its rule
        self.time_budget = time_budget
        self.instruments: tuple[Instrument, ...] = tuple(instruments)
        self.records: dict[str, Record] = {}
        self._known = Knowledge()
        self.on_error = on_error
        self.seed = seed
        self.figures = figures
        self.progress = progress
        self._panels = Panels(self.prefix, figures)
        self._progress: Progress | None = None  # of the measurement under way
        self._history = History()
        self._identity = uuid.uuid4().hex  # drawn by the system: no seed of training moves
        self._num_validations = 0
        self._batches: Sequence[Any] | None = None
        self._ranks = ALONE
        self._pending: dict[str, float] | None = None
        self._clock: float | None = None
        self._pairs = Pairs(self.monitors, isinstance(data, str) and data == "train")
        self._guard = Guard(on_error)
        self._budgeting = Budgeting(time_budget, self._guard, type(self).__name__)
        self._handover = HandOver(self._panels, self._guard, self.correlation_prefix)
        self._enabled = True
        self._warned: set[str] = set()

    # What a subclass gives ---------------------------------------------------------------------

    def check(self, pl_module: Any) -> None:
        """Raise ValueError where the arguments do not fit the module; called before training."""
        for instrument in self.instruments:
            instrument.check(pl_module)

    def check_data(self, trainer: Any) -> None:
        """Raise ArgumentError where the arguments do not fit the data; called before training."""

    def session(self, pl_module: Any, batches: Sequence[Any]) -> Session:
        """Return the session that all instruments of a measurement share."""
        raise NotImplementedError

    def expected_work(self) -> int:
        """Return about how many products (or gradients) the first measurement takes; 0 unknown."""
        return 0

    def spectrum_code(self) -> str | None:
        """Return the spectrum of the last measurement as a text for the history, if it has one."""
        return None

    def drawings(self) -> Drawings:
        """Return what draws the figures of the last measurement, by name."""
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
        """Return the history, its spectra and the count of validations."""
        return {
            "history": self.history,
            "num_validations": self._num_validations,
            "identity": self._identity,
            "account": self._budgeting.state_dict(),
            **self._panels.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint; with a new one where it is damaged."""
        self._guard.attempt("reading the history of the checkpoint", self._load, state_dict)
        self._guard.settle(ALONE)

    def _load(self, state_dict: dict[str, Any]) -> None:
        history = History.checked(state_dict["history"])
        number = state_dict["num_validations"]
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"num_validations={number!r} is no count.")
        identity = state_dict.get("identity", self._identity)
        if not isinstance(identity, str):
            raise ValueError(f"identity={identity!r} is no text.")
        self._budgeting.load_state_dict(state_dict["account"])
        self._panels.load_state_dict(state_dict)
        self._history, self._num_validations, self._identity = history, number, identity

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot work, before anything is trained."""
        self._enabled = stage == "fit" or (
            stage == "validate" and getattr(self.schedule, "during_validate", False)
        )
        if stage == "fit":
            self._identity = uuid.uuid4().hex  # that of a checkpoint is loaded after this
            self._batches = None
            self._pairs.forget()
        self._guard.speaks = trainer.is_global_zero
        self._clock = None
        self._budgeting.begin()
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
        if averages_weights(trainer):
            self._warn_once("averaging", AVERAGED)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the arguments against the module, which is complete now."""
        if self._enabled:
            with whole(trainer.strategy.model):
                self.check(pl_module)

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
        self._clock = time.monotonic()

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measures and logs, when it is due and the budget pays for it."""
        self._pending = None
        if not self._enabled or trainer.sanity_checking:
            return
        started = time.monotonic()
        if self._clock is not None:
            self._budgeting.account.earn(started - self._clock)
        fitting = trainer.state.fn == "fit"
        if not fitting or self._budgeting.may_measure(trainer, self._is_due(trainer)):
            self._pending = self._measure_or_report(trainer, pl_module)
        self._clock = time.monotonic()
        if self._pending is not None:
            self._guard.attempt(
                "logging the statistics", self._handover.log, trainer, pl_module, self._pending
            )
            self._guard.settle(self._ranks)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Pairs the measurement with the metrics of the same validation, and correlates."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        fresh = self._guard.attempt(
            "reading the metrics", self._pairs.see, trainer.callback_metrics
        )
        pending, self._pending = self._pending, None
        if pending is not None:
            self._pair(trainer, pending, fresh or {})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last validation where it was not; draw; say what was skipped."""
        if not self._enabled:
            return
        self._catch_up(trainer, pl_module)
        if self._history.rows:
            if trainer.is_global_zero:
                self._guard.attempt("drawing figures", self._draw, trainer, True)
            self._guard.settle(self._ranks)
        self._budgeting.summarize()

    # Inside ------------------------------------------------------------------------------------

    def measure(
        self, trainer: Any, pl_module: Any, batches: Sequence[Any]
    ) -> tuple[dict[str, float], list[str]] | None:
        """Return the statistics by logged name, and a sentence for each that is absent.

        All ranks call it together; those of ``self._ranks.group`` share the work. The record of
        each instrument is kept in ``records``. None stands for a measurement that was not begun:
        one product has been timed, and the budget does not pay for a whole one.

        Raises:
            MeasurementError: The time that the budget allows was up before all was measured.
        """
        begun = time.monotonic()
        with self.session(pl_module, batches) as session:
            account = self._budgeting.account
            if account.bounded and account.estimate is None:
                self._estimate(trainer, session)
                if not self._budgeting.affords(trainer):
                    return None
            budget = replace(self.time_budget, share=None)
            allowance = budget.open(session, self._progress)
            found = measured(
                self.instruments, session, allowance, prefix=self.prefix,
                strict=self.on_error == "raise", progress=self._progress,
            )  # fmt: skip
        seconds = time.monotonic() - begun
        if allowance.was_over:
            account.estimate = max(seconds, account.estimate or 0.0)
            raise MeasurementError(
                f"the time was up after {seconds:.3g} s, before all was measured, so nothing "
                f"is logged. Raise time_budget={self.time_budget}, or lower num_batches "
                f"({self.num_batches})."
            )
        self.records, scalars = found.records, found.scalars
        if self.work[1] == "num_hvps":  # of all instruments together
            scalars["num_hvps"] = allowance.spent
        scalars["seconds"] = seconds
        return scalars, found.absent

    def seconds_of_unit(self, session: Session) -> float:
        """Return what a product takes: the shorter of two, the first of which warms up."""
        operator = session.operator()
        vector = torch.ones(
            operator.shard.length, dtype=session.space.dtype, device=session.space.device
        )
        taken = []
        for _ in range(2):
            begun = time.monotonic()
            operator.matvec(vector).sum().item()
            taken.append(time.monotonic() - begun)
        return min(taken)

    def _estimate(self, trainer: Any, session: Session) -> None:
        """Time a unit of work, and say what a whole measurement will take."""
        with session.ranks.together():
            unit = self.seconds_of_unit(session)
            costs = {one.name: float(one.cost(session)) for one in self.instruments}
        total = sum(costs.values())
        seconds = total * unit + (session.known.seconds_to_build or 0.0)
        most = _ADVICE.get(max(costs, key=costs.__getitem__), "the cost of your instruments")
        advice = f"num_batches ({self.num_batches}) or {most.format(**vars(self))}"
        self._budgeting.estimate(trainer, seconds, (total, self.work[0]), advice)

    def _catch_up(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last validation of a run whose end nobody foresaw; say so where it is late.

        Its row is logged once more with the metrics of that validation, since the loggers have
        closed it.
        """
        if not self._budgeting.catches_up(trainer):
            return
        pending = self._measure_or_report(trainer, pl_module)
        self._budgeting.caught_up(pending is not None)
        if pending is None:
            return
        if trainer.is_global_zero:
            self._guard.attempt(
                "logging the statistics", self._handover.log_late, trainer, pending,
                self._pairs.latest(),
            )  # fmt: skip
        self._pair(trainer, pending, self._pairs.latest())

    def _pair(self, trainer: Any, pending: Mapping[str, float], fresh: Mapping[str, Any]) -> None:
        """Remember a measurement with the metrics of its validation, and hand it over."""
        found = self._guard.attempt("pairing", self._pairs.of, fresh, pending)
        monitored: dict[str, float] = found[0] if found else {}
        missing: dict[str, str] = found[1] if found else {}
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        self._history.add({**place, **pending, **monitored})
        for topic, reason in {**missing, **incomparable(self._history.rows)}.items():
            self._warn_once(topic, reason)
        if trainer.is_global_zero:
            self._guard.attempt("handing over the results", self._hand_over, trainer)
        self._guard.settle(self._ranks)

    def _hand_over(self, trainer: Any) -> None:
        """Give the loggers what is known only now: correlations, the spectrum, figures."""
        row = self._history.rows[-1]
        self._handover.pair(trainer, row, self.correlations)
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
        rows = self._history.rows
        last_step = int(rows[-1]["step"]) if rows else None

        def ask() -> bool:
            step = trainer.global_step
            return bool(self.schedule.is_due(self._num_validations, step, last_step))

        due = bool(self._guard.attempt("the schedule", ask))
        self._guard.settle(self._ranks)
        found: bool = trainer.strategy.broadcast(due)
        return found

    def _measure_or_report(self, trainer: Any, pl_module: Any) -> dict[str, float] | None:
        """Return rank zero's statistics on all ranks, or None where the measurement failed."""
        failure: Exception | None = None
        found: tuple[dict[str, float], list[str]] | None = None
        begun = time.monotonic()
        self._ranks = trainer_ranks(trainer, pl_module)
        try:
            with self._ranks.together():
                if self._batches is None:
                    self._batches = probe_batches(trainer, self.data, self.num_batches, self.seed)
            self._progress = self._new_progress(trainer)
            with whole(trainer.strategy.model):
                found = self.measure(trainer, pl_module, self._batches)
            self._tell_found(trainer, found)
        except Exception as error:  # noqa: BLE001 - training must go on; it is reported below
            failure = error
            if self._progress is not None:
                self._progress.close()
        seconds = time.monotonic() - begun
        account = self._budgeting.account
        account.pay(seconds)
        if trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            if found is None:
                self._budgeting.not_begun()
                return None
            self._warn_of_cost(seconds)
            account.measured(seconds)
            scalars: dict[str, float] = trainer.strategy.broadcast(found[0])
            return scalars
        if self._ranks.world > 1 and not isinstance(failure, RankError):
            failure = named(failure, self._ranks)
        assert failure is not None
        if self.on_error == "raise":
            raise failure
        if trainer.is_global_zero:
            warnings.warn(
                f"No {self.prefix} statistics at step {trainer.global_step}, training goes on: "
                f"{sentence(failure)}",
                stacklevel=2,
            )
        return None

    def _new_progress(self, trainer: Any) -> Progress:
        shown = self.progress and trainer.is_global_zero
        unit, statistic = self.work
        rows = self._history.rows
        return Progress(
            trainer.progress_bar_callback if shown else None,
            self.prefix,
            unit=unit,
            expected=int(rows[-1].get(statistic, 0)) if rows else self.expected_work(),
        )

    def _tell_found(self, trainer: Any, found: tuple[dict[str, float], list[str]] | None) -> None:
        """Close the bar with a line on what was found, and warn of what is absent."""
        assert self._progress is not None
        if found is None:
            self._progress.close()
            return
        scalars, absent = found
        line = self._guard.attempt(
            "the line of the progress bar", summary_line, self.prefix, trainer.global_step, scalars
        )
        self._progress.close(line)
        for reason in absent if trainer.is_global_zero else ():
            if reason not in self._warned:  # what is so every time is told once
                self._warned.add(reason)
                warnings.warn(f"Step {trainer.global_step}: {reason}", stacklevel=2)

    def _warn_of_cost(self, seconds: float) -> None:
        """Warn once of a measurement that takes long, where no budget bounds it."""
        account = self._budgeting.account
        trained = account.trained / (account.made + 1)
        costly = seconds > max(_COSTLY_SECONDS, _COSTLY_SHARE * trained)
        if self.time_budget.share is None and self._clock is not None and costly:
            self._warn_once(
                "cost",
                f"The measurement took {seconds:.1f} s after {trained:.1f} s of training. "
                "Give time_budget=0.2, the share of the training time that measurements may take.",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned and self._ranks.rank == 0:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)

"""One measurement in a Trainer: its session, its estimate, its instruments, its failures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_hessian.callbacks.budgeting import Budgeting
from lightning_hessian.callbacks.guard import Guard, named, sentence
from lightning_hessian.callbacks.instruments import Findings, measured
from lightning_hessian.callbacks.probe_data import ProbeData, probe_batches
from lightning_hessian.callbacks.surroundings import trainer_ranks
from lightning_hessian.linear.ranks import ALONE, RankError
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Instrument, Record
from lightning_hessian.measure.session import Knowledge, Session
from lightning_hessian.probe.sharding.fsdp1 import whole
from lightning_hessian.results import MeasurementError
from lightning_hessian.tracking.progress import Progress, summary_line

FEW_PRODUCTS = 10
"""An instrument of no more products is measured between whole measurements too."""

_COSTLY_SHARE = 0.2  # of the training time since the last measurement
_COSTLY_SECONDS = 1.0  # below which no cost is worth a word
_ADVICE = {
    "spectrum": "num_eigenvalues ({num_eigenvalues})",
    "layers": "the number of layers",
    "blocks": "the number of blocks",
    "gradients": "num_gradients ({num_gradients})",
}
"""By the instrument that costs most: what to lower."""


class Measuring:
    """Measures once, and says what it takes; when that is due is the callback's business.

    Args:
        data: What is measured on.
        num_batches: How many probe batches.
        time_budget: What measurements may cost.
        on_error: ``"warn"`` or ``"raise"``.
        seed: Of everything random here.
        progress: Whether a bar is shown.
        instruments: What measures, in this order.
    """

    prefix: str
    work = ("HVPs", "num_hvps")  # what the progress bar counts, and the statistic that tells it

    def __init__(
        self,
        *,
        data: ProbeData,
        num_batches: int,
        time_budget: Budget,
        on_error: str,
        seed: int,
        progress: bool,
        instruments: Sequence[Instrument],
    ) -> None:
        super().__init__()
        self.data = data
        self.num_batches = num_batches
        self.time_budget = time_budget
        self.on_error = on_error
        self.seed = seed
        self.progress = progress
        self.instruments: tuple[Instrument, ...] = tuple(instruments)
        self.records: dict[str, Record] = {}
        self._known = Knowledge()
        self._progress: Progress | None = None  # of the measurement under way
        self._batches: Sequence[Any] | None = None
        self._ranks = ALONE
        self._guard = Guard(on_error)
        self._budgeting = Budgeting(time_budget, self._guard, type(self).__name__)
        self._num_probed = num_batches  # the data may hold fewer
        self._few: tuple[Instrument, ...] | None = None  # of a few products; None: not yet known
        self._known_of_few = Knowledge()
        self._next_of_few = 1.0  # products of the next of these, over those of the last
        self._last_work = 0  # products of the measurement before
        self._warned: set[str] = set()
        self._step = 0  # of the row that loggers have for what is measured now

    def check(self, pl_module: Any) -> None:
        """Raise ValueError where the arguments do not fit the module; called before training."""
        for instrument in self.instruments:
            instrument.check(pl_module)

    def session(self, pl_module: Any, batches: Sequence[Any]) -> Session:
        """Return the session that all instruments of a measurement share."""
        raise NotImplementedError

    def expected_work(self) -> int:
        """Return about how many products (or gradients) the first measurement takes; 0 unknown."""
        return 0

    def measure_few(self, pl_module: Any, batches: Sequence[Any]) -> Findings:
        """Return what the instruments of a few products find; all ranks call it together.

        So few products do not repay a linearisation, and retained graphs are ready at once.
        """
        session = self.session(pl_module, batches)
        session.known, session.expected_products = self._known_of_few, FEW_PRODUCTS
        few = self._few or ()
        with session:
            cost = _products(few, session)
            found = measured(
                few, session, replace(self.time_budget, share=None).open(session),
                prefix=self.prefix, strict=self.on_error == "raise",
            )  # fmt: skip
            self._next_of_few = _products(few, session) / cost if cost else 1.0
        self.records.update(found.records)
        return found

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
        account = self._budgeting.account
        if trainer.state.fn == "fit" and account.bounded and account.estimate is None:
            self._estimate(trainer, pl_module, batches)
            if not self._budgeting.affords(trainer):
                return None
        begun = time.monotonic()
        with self.session(pl_module, batches) as session:
            budget = replace(self.time_budget, share=None)
            allowance = budget.open(session, self._progress)
            found = measured(
                self.instruments, session, allowance, prefix=self.prefix,
                strict=self.on_error == "raise", progress=self._progress,
            )  # fmt: skip
        seconds = time.monotonic() - begun
        if allowance.was_over:
            raise MeasurementError(
                f"the time was up after {seconds:.3g} s, before all was measured, so nothing "
                f"is logged. Raise time_budget={self.time_budget}, or lower num_batches "
                f"({self.num_batches})."
            )
        self.records, scalars = found.records, found.scalars
        if self.work[1] == "num_hvps":  # of all instruments together
            scalars["num_hvps"] = allowance.spent
        scalars["seconds"] = seconds
        self._last_work = int(scalars.get(self.work[1], 0))
        return scalars, found.absent

    def expected_seconds(self, session: Session, work: float) -> float:
        """Return what so many products over all probe batches will take, by two over some.

        The first of them warms up. A product over all batches costs as many times more as there
        are more of them, and so does its making ready.

        Args:
            session: Over the first probe batches.
            work: How many products.
        """
        operator = session.operator()
        vector = torch.ones(
            operator.shard.length, dtype=session.space.dtype, device=session.space.device
        )
        taken = []
        for _ in range(2):
            begun = time.monotonic()
            operator.matvec(vector).sum().item()
            taken.append(time.monotonic() - begun)
        seconds = work * min(taken) + (session.known.seconds_to_build or 0.0)
        return seconds * self._num_probed / len(list(session.batches))

    def _estimate(self, trainer: Any, pl_module: Any, batches: Sequence[Any]) -> None:
        """Time a unit of work, and say what a whole measurement will take.

        One batch for each rank tells: a trial over all of them would cost as much as a tenth of
        a measurement, only to say that it has to wait.
        """
        self._num_probed = len(batches)
        session = self.session(pl_module, batches[: self._ranks.world])
        session.known = Knowledge()  # what a part of the batches takes is not to be remembered
        with warnings.catch_warnings(), session, session.ranks.together():
            warnings.simplefilter("ignore")  # the measurement will say the same of all batches
            costs = {one.name: float(one.cost(session)) for one in self.instruments}
            total = sum(costs.values())
            seconds = self.expected_seconds(session, total)
            self._few = _of_few_products(self.instruments, session)
            if self._few:  # a product for each batch, or two, where all is ready at once
                few = _products(self._few, session)  # from nothing, the first time
                self._budgeting.account.estimate_of_few = seconds * (few + 1) / total
        most = _ADVICE.get(max(costs, key=costs.__getitem__), "the cost of your instruments")
        advice = f"num_batches ({self.num_batches}) or {most.format(**vars(self))}"
        self._budgeting.estimate(trainer, seconds, (total, self.work[0]), advice)

    def _learn_few(self, trainer: Any, pl_module: Any) -> None:
        """Learn which instruments take a few products and, under a bound, what time these take."""
        failure: Exception | None = None
        begun = time.monotonic()
        account = self._budgeting.account
        try:
            self._draw_where_needed(trainer, pl_module)
            assert self._batches is not None
            with whole(trainer.strategy.model):
                if account.bounded and account.estimate is None:
                    self._estimate(trainer, pl_module, self._batches)
                else:
                    session = self.session(pl_module, self._batches[: self._ranks.world])
                    with session, session.ranks.together():
                        self._few = _of_few_products(self.instruments, session)
        except Exception as error:  # noqa: BLE001 - training must go on; it is reported below
            failure = error
        account.pay(time.monotonic() - begun)
        if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            self._few = ()
            said = sentence(self._to_be_told(failure))
            self._warn_once(said, f"Nothing is measured between validations: {said}")

    def _draw_where_needed(self, trainer: Any, pl_module: Any) -> None:
        """Draw the probe batches, where that could not be done before training."""
        self._ranks = trainer_ranks(trainer, pl_module)
        with self._ranks.together():
            if self._batches is None:
                self._batches = probe_batches(trainer, self.data, self.num_batches, self.seed)

    def _measure_or_report(self, trainer: Any, pl_module: Any) -> dict[str, float] | None:
        """Return rank zero's statistics on all ranks, or None where the measurement failed."""
        failure: Exception | None = None
        found: tuple[dict[str, float], list[str]] | None = None
        begun = time.monotonic()
        try:
            self._draw_where_needed(trainer, pl_module)
            assert self._batches is not None
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
        account.failed(seconds)
        failure = self._to_be_told(failure)
        if trainer.is_global_zero:
            warnings.warn(
                f"No {self.prefix} statistics at step {self._step}, training goes on: "
                f"{sentence(failure)}",
                stacklevel=2,
            )
        return None

    def _to_be_told(self, failure: Exception | None) -> Exception:
        """Return a failure with the rank that it comes from; raise it where the user wants that."""
        assert failure is not None  # ranks fail together
        if self._ranks.world > 1 and not isinstance(failure, RankError):
            failure = named(failure, self._ranks)
        if self.on_error == "raise":
            raise failure
        return failure

    def _few_or_report(self, trainer: Any, pl_module: Any) -> dict[str, float] | None:
        """Return what the instruments of a few products have found, None where they failed."""
        begun = time.monotonic()
        failure: Exception | None = None
        found: Findings | None = None
        try:
            assert self._batches is not None  # they were drawn when `_few` became known
            with whole(trainer.strategy.model):
                found = self.measure_few(pl_module, self._batches)
            self._tell_absent(trainer, found.absent)
        except Exception as error:  # noqa: BLE001 - training must go on; it is reported below
            failure = error
        self._budgeting.account.pay_few(time.monotonic() - begun, self._next_of_few)
        if trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            assert found is not None
            scalars: dict[str, float] = trainer.strategy.broadcast(found.scalars)
            return scalars
        said = sentence(self._to_be_told(failure))
        names = ", ".join(one.name for one in self._few or ())
        self._warn_once(said, f"No statistics of {names}, training goes on: {said}")
        return None

    def _new_progress(self, trainer: Any) -> Progress:
        shown = self.progress and trainer.is_global_zero
        return Progress(
            trainer.progress_bar_callback if shown else None,
            self.prefix,
            unit=self.work[0],
            expected=self._last_work or self.expected_work(),
        )

    def _tell_found(self, trainer: Any, found: tuple[dict[str, float], list[str]] | None) -> None:
        """Close the bar with a line on what was found, and warn of what is absent."""
        assert self._progress is not None
        if found is None:
            self._progress.close()
            return
        scalars, absent = found
        line = self._guard.attempt(
            "the line of the progress bar", summary_line, self.prefix, self._step, scalars
        )
        self._progress.close(line)
        self._tell_absent(trainer, absent)

    def _tell_absent(self, trainer: Any, absent: Sequence[str]) -> None:
        """Warn of statistics that are missing, on rank zero."""
        for reason in absent if trainer.is_global_zero else ():
            if reason not in self._warned:  # what is so every time is told once
                self._warned.add(reason)
                warnings.warn(f"Step {self._step}: {reason}", stacklevel=2)

    def _warn_of_cost(self, seconds: float) -> None:
        """Warn once of a measurement that takes long, where no budget bounds it."""
        account = self._budgeting.account
        trained = account.trained / (account.made + 1)
        costly = seconds > max(_COSTLY_SECONDS, _COSTLY_SHARE * trained)
        if self.time_budget.share is None and account.trained and costly:
            self._warn_once(
                "cost",
                f"The measurement took {seconds:.1f} s after {trained:.1f} s of training. "
                "Give time_budget=0.2, the share of the training time that measurements may take.",
            )

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned and self._ranks.rank == 0:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)


def _products(instruments: Sequence[Instrument], session: Session) -> float:
    """Return about how many products instruments take, each by what it starts from."""
    return sum(float(one.cost(session)) for one in instruments)


def _of_few_products(instruments: Sequence[Instrument], session: Session) -> tuple[Instrument, ...]:
    """Return the instruments that are measured between whole measurements too.

    An instrument may take more the first time; ``cost_between`` says then what it takes after that.
    """
    costs = {one.name: getattr(one, "cost_between", one.cost)(session) for one in instruments}
    return tuple(one for one in instruments if costs[one.name] <= FEW_PRODUCTS)

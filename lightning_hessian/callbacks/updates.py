"""The last update of a run: what the optimizers added to the parameters before a measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hessian.callbacks.guard import Guard
from lightning_hessian.callbacks.steps import StepCount
from lightning_hessian.probe.parameters import local
from lightning_hessian.probe.sharding.kinds import is_wrapper


class LastUpdate:
    """Holds the parameters from before a step until it is made, and then what it has changed.

    A difference of parameters is the update as it was applied, whatever the optimizer, its
    accumulation, its clipping or the loss scaler made of it. Several steps within one batch, of
    several optimizers or by hand, count as one update. Between `begin` and `forget` this takes the
    memory of the trained parameters once, as this rank holds them.

    Attributes:
        seen: Whether a validation has come since; it may not have been measured.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor] | None = None  # by identity of the parameter
        self._changed: dict[str, Tensor] | None = None
        self._batch: int | None = None  # that stepped last
        self.seen = False

    @property
    def parts(self) -> dict[str, Tensor] | None:
        """The update by name of the parameter, this rank's part; None where none was recorded."""
        return self._changed

    def begin(self, trainer: Any, pl_module: Any, wanted: bool) -> None:
        """Keep the parameters that are about to be stepped, before the first step of a batch.

        Args:
            trainer: Right before ``optimizer.step()``.
            pl_module: Its module.
            wanted: Whether a measurement may follow this batch.
        """
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        if batch == self._batch:
            return  # a further step of the same batch
        self.forget()
        self._batch = batch
        # Under FSDP1 parameters are pieces of flat ones, which measurements do not know by name.
        if wanted and not any(is_wrapper(part) for part in trainer.strategy.model.modules()):
            self._before = {
                key: local(parameter).detach().clone()
                for key, parameter in _trained(trainer, pl_module).items()
            }

    def end(self, trainer: Any, pl_module: Any) -> None:
        """Take the difference, once the batch is done; in float32 where parameters have less."""
        if self._before is None:
            return
        before, self._before = self._before, None
        trained = _trained(trainer, pl_module)
        with torch.no_grad():
            changed = {
                key: _difference(local(parameter).detach(), before.pop(key))
                for key, parameter in trained.items()
                if key in before
            }
        self._changed = {
            name: changed[id(parameter)]
            for name, parameter in pl_module.named_parameters(remove_duplicate=False)
            if id(parameter) in changed
        }

    def forget(self) -> None:
        """Let go of everything."""
        self._before = self._changed = self._batch = None
        self.seen = False


def _trained(trainer: Any, pl_module: Any) -> dict[int, Tensor]:
    """Return the parameters of the module that optimizers hold, by identity.

    Whether one requires a gradient does not tell: training by hand switches that off and on.
    """
    held = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {id(one): one for one in pl_module.parameters() if id(one) in held}


def _difference(after: Tensor, before: Tensor) -> Tensor:
    """Return ``after - before``, in the memory of ``before`` where its precision is enough."""
    if before.dtype.itemsize < 4:
        return after.float() - before.float()
    return torch.sub(after, before, out=before)


class RecordsUpdates:
    """The hooks by which a callback records the last update, where a measurement may follow it."""

    records_updates = False  # whether what is measured wants to know it
    _enabled: bool
    _guard: Guard
    _steps: StepCount

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._update = LastUpdate()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the parameters before a step that a measurement may follow."""
        if self._enabled and self.records_updates:
            self._guard.attempt("recording the last update", self._keep, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find what the step has changed."""
        if self._enabled:
            self._guard.attempt("recording the last update", self._update.end, trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of it."""
        self._update.forget()

    def _keep(self, trainer: Any, pl_module: Any) -> None:
        wanted = self._steps.may_measure_after(trainer, pl_module)
        self._update.begin(trainer, pl_module, wanted)

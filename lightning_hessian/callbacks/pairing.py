"""The metrics of a validation beside its measurement: those monitored, and the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_hessian.callbacks.surroundings import logged_in_validation, unknown_metric

GAP = "gap"
"""The generalization gap: the validation loss minus the loss on the training probe."""


def validation_loss(monitors: Sequence[str], known: Mapping[str, Any]) -> str | None:
    """Return which metric the gap is taken from.

    It is the first monitored metric with "loss" in its name, else ``val_loss`` where it is logged;
    None where there is neither. An error rate or an accuracy has no gap to a loss.

    Example:
        >>> validation_loss(("val_error", "gap"), {"val_error": 0.1, "val_loss": 0.3})
        'val_loss'
    """
    losses = [name for name in monitors if "loss" in name.lower()]
    return next((name for name in [*losses, "val_loss"] if name in known), None)


class Pairs:
    """Finds what a measurement is paired with: the metrics of the same validation.

    There is a gap only where the probe is of the training data.
    """

    def __init__(self, monitors: Sequence[str], on_training_data: bool) -> None:
        self.monitors = monitors
        self.on_training_data = on_training_data
        self._metrics: dict[str, Any] = {}  # those of the validation before
        self._of_validations: set[str] = set()

    def forget(self) -> None:
        """Begin anew: no metric is of a validation before."""
        self._metrics, self._of_validations = {}, set()

    def see(self, trainer: Any) -> dict[str, Any]:
        """Return which of ``trainer.callback_metrics`` are of this validation, or logged since.

        Those of training are new where their tensors are. Those of an older validation may have new
        tensors, too: Lightning makes them for whoever asks, as ``ModelCheckpoint`` does after us.
        """
        now = logged_in_validation(trainer)
        self._of_validations |= now
        before, self._metrics = self._metrics, dict(trainer.callback_metrics)
        return {
            name: value
            for name, value in self._metrics.items()
            if name in now or (name not in self._of_validations and value is not before.get(name))
        }

    def latest(self) -> dict[str, Any]:
        """Return the metrics of the last validation."""
        return dict(self._metrics)

    def of(
        self, fresh: Mapping[str, Any], pending: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return the monitored values, and for each that cannot be had why, by its name.

        ``fresh`` are the metrics of this validation, ``pending`` the statistics measured in it.
        """
        missing = {
            name: unknown_metric(name, list(self._metrics))
            for name in self.monitors
            if name not in self._metrics and name != GAP
        }
        found = {name: float(fresh[name]) for name in self.monitors if name in fresh}
        if GAP in self.monitors and GAP not in self._metrics and self.on_training_data:
            loss = validation_loss(self.monitors, self._metrics)
            if loss is None:
                missing[GAP] = (
                    "There is no generalization gap, since no validation loss is logged: log "
                    "val_loss in validation_step, or name the loss in monitor=."
                )
            elif loss in fresh and "loss" in pending:
                found[GAP] = float(fresh[loss]) - pending["loss"]
        return found, missing


def incomparable(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return what to tell where the last measurement has fitted another number of eigenvalues."""
    found = {}
    for name, count in rows[-1].items():
        if name.rpartition("/")[2] != "num_fitted":
            continue
        last = next((row[name] for row in reversed(rows[:-1]) if name in row), count)
        if last != count:
            found[name] = (
                f"{name} changed from {last:.0f} to {count:.0f}: the power laws were fitted to "
                "different numbers of eigenvalues, so their d_ks, and correlations with them, are "
                "not comparable over this run. Lower num_eigenvalues, or allow a measurement more."
            )
    return found

"""A bar for a measurement that takes its time, beside those of Lightning, and a line at its end.

The bar is drawn by whatever draws Lightning's: one more of tqdm's below the others, or one more
task in rich's display. Where Lightning shows no bar (other ranks, ``enable_progress_bar=False``, a
bar of another kind), neither does this.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lightning_hessian.results.base import text_of

_PATIENCE = 1.0  # seconds before a bar is worth drawing
_INTERVAL = 0.1  # seconds between two updates


class Bar(Protocol):
    """Something that shows how far a measurement is."""

    def show(self, done: int, total: int, text: str) -> None:
        """Show ``done`` of about ``total`` products, and a text before it."""

    def close(self) -> None:
        """Take the bar away."""


class TqdmBar:
    """A bar of tqdm's below the training and validation bars, of the class that they have."""

    def __init__(self, lightning_bar: Any, unit: str) -> None:
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        self._bar = Tqdm(
            total=1,  # a notebook draws a bar without total as a stub that is full
            position=2 * lightning_bar.process_position + 2,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            f"{unit} [{{elapsed}}<{{remaining}}]",
        )

    def show(self, done: int, total: int, text: str) -> None:
        """Show ``done`` of about ``total`` products, and a text before it."""
        self._bar.total = total
        widget = getattr(self._bar, "container", None)
        if widget is not None:  # in a notebook tqdm looks at the total once, at the beginning
            widget.children[-2].max = total
        self._bar.n = done
        self._bar.set_description_str(text)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.n = self._bar.total  # a notebook's bar that closes before turns red, and stays
        self._bar.close()


class RichBar:
    """A task in the display of Lightning's rich bar.

    The task is hidden, not removed: Lightning finds its own tasks by their place in the list.
    """

    def __init__(self, lightning_bar: Any, unit: str) -> None:
        self._unit = unit
        self._lightning_bar = lightning_bar
        self._progress = lightning_bar.progress
        self._task = self._progress.add_task("", total=1, visible=False)

    def show(self, done: int, total: int, text: str) -> None:
        """Show ``done`` of about ``total`` products, and a text before it."""
        told = f"{text}, {self._unit}"
        self._progress.update(
            self._task, completed=done, total=total, description=told, visible=True
        )
        self._lightning_bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        self._progress.update(self._task, visible=False)
        self._lightning_bar.refresh()


BARS: Mapping[str, Callable[[Any, str], Bar]] = {
    "TQDMProgressBar": TqdmBar,
    "RichProgressBar": RichBar,
}
"""Whose bar is drawn how, by the name of the class or of an ancestor."""


class Progress:
    """Follows a measurement, product by product; a bar appears once it has taken a second.

    Args:
        lightning_bar: ``trainer.progress_bar_callback``, None for none.
        name: What the bar is of.
        unit: What it counts.
        expected: About how many products it will take; 0 where nothing is known.
    """

    def __init__(
        self, lightning_bar: Any, name: str, *, unit: str = "HVPs", expected: int = 0
    ) -> None:
        enabled = lightning_bar is not None and getattr(lightning_bar, "is_enabled", False)
        kinds = [kind.__name__ for kind in type(lightning_bar).__mro__]
        self._make = next((BARS[kind] for kind in kinds if kind in BARS), None) if enabled else None
        self._lightning_bar = lightning_bar
        self._name = name
        self._unit = unit
        self._wanted: int | None = None
        self._expected = expected
        self._done = 0
        self._converged: int | None = None
        self._started = time.monotonic()
        self._shown_at = self._started + _PATIENCE - _INTERVAL
        self._bar: Bar | None = None

    @property
    def visible(self) -> bool:
        """Whether a bar has appeared."""
        return self._bar is not None

    def __call__(self, num_products: int, num_converged: int | None = None) -> None:
        """Take in the products so far, and the eigenvalues that converged."""
        self._done = num_products
        if num_converged is not None:
            self._converged = num_converged
        now = time.monotonic()
        if self._make is None or now - self._shown_at < _INTERVAL:
            return
        self._shown_at = now
        try:
            if self._bar is None:
                self._bar = self._make(self._lightning_bar, self._unit)
            # Past what was expected, nine tenths: the end is near, but nobody knows how near.
            total = max(self._expected, round(self._done / 0.9), 1)
            self._bar.show(self._done, total, self._text())
        except Exception as error:  # noqa: BLE001 - a bar must not cost the measurement
            self._give_up(error)

    def next_part(self, name: str, wanted: int | None) -> None:
        """Name what is measured now, and say how many eigenvalues it wants, if any."""
        self._name, self._wanted = name, wanted

    def close(self, line: str | None = None) -> None:
        """Take the bar away, and print a line if it was there to see."""
        bar, self._bar, self._make = self._bar, None, None
        if bar is None:
            return
        try:
            bar.close()
            if line is not None:
                self._lightning_bar.print(line)
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def _text(self) -> str:
        if self._wanted is None or self._converged is None:
            return self._name
        return f"{self._name}, {self._converged} of {self._wanted} converged"

    def _give_up(self, error: Exception) -> None:
        self._make = self._bar = None
        warnings.warn(
            f"The progress bar of the measurement failed "
            f"({type(error).__name__}: {text_of(error)}); the measurement goes on. "
            "Leave it out with progress=False.",
            stacklevel=3,
        )


_LINE = (
    ("lambda_1", "lambda_1 {:.4g}"),
    ("trace", "trace {:.4g}"),
    ("s_hat", "s_hat {:.3f}"),
    ("d_ks", "d_ks {:.4f}"),
    ("d_c", "d_c {:.4f}"),
    ("block_off_diagonal_ratio", "block ratio {:.3g}"),
)


def summary_line(prefix: str, step: int, scalars: Mapping[str, float]) -> str:
    """Return what came out of a measurement, in one line; statistics that lack are left out.

    Example:
        >>> summary_line("hessian", 30, {"lambda_1": 12.0, "d_ks": 0.05, "seconds": 2.0})
        'hessian at step 30: lambda_1 12, d_ks 0.0500 in 2.0 s'
    """
    parts = [form.format(scalars[name]) for name, form in _LINE if name in scalars]
    if {"num_converged", "num_eigenvalues"} <= scalars.keys():
        counts = f"{scalars['num_converged']:.0f} of {scalars['num_eigenvalues']:.0f} converged"
        parts.insert(0, counts)
    text = f"{prefix} at step {step}: {', '.join(parts)} in "
    if "num_hvps" in scalars:
        text += f"{scalars['num_hvps']:.0f} HVPs, "
    return text + f"{scalars['seconds']:.1f} s"

"""How a record shows itself: a few lines, a picture, a table.

What the lines and the picture say needs statistics and matplotlib, which stand above this room. So
the module that knows them is named by the class, not imported, and looked up when somebody first
asks, as pandas looks up its plotting backend. It has three functions: ``telling(record)``,
``draw(record, axes)`` and ``columns(record)``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_hessian.results.base import text_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_TRACKING = "lightning_hessian.tracking.views"

Lines = Sequence[tuple[str, str]]
"""What a line is about, and what it says."""


@dataclass(frozen=True)
class Telling:
    """What a record says of itself.

    Attributes:
        title: What it is, in one line.
        brief: The lines of its repr.
        more: The further lines of its summary.
    """

    title: str
    brief: Lines
    more: Lines = ()


class Shown:
    """A record that shows itself: ``repr``, `summary`, `plot`, `to_pandas`, and in notebooks."""

    _views: ClassVar[str] = _TRACKING

    def summary(self) -> str:
        """Return everything worth knowing, as plain text of some ten lines."""
        told = self._view("telling")
        return _text(told.title, [*told.brief, *told.more])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the record.

        Args:
            ax: Where to draw; by default axes of a new pyplot figure, which a notebook shows and
                ``plt.show()`` opens.

        Returns:
            The matplotlib axes, to go on from.

        Raises:
            ValueError: There is nothing to draw; the message says why.
        """
        return self._on(ax)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the numbers as a pandas DataFrame; `summary` says what else there is.

        Raises:
            ImportError: pandas is not installed; nothing else here needs it.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__}.to_pandas() needs pandas, which lightning_hessian does not "
                "install: pip install pandas."
            ) from error
        return pandas.DataFrame(self._view("columns"))

    def __repr__(self) -> str:
        try:
            told = self._view("telling")
            return _text(told.title, told.brief)
        except Exception as error:  # noqa: BLE001 - a debugger that prints a record must not fail
            return _visible(f"<{type(self).__name__}: {type(error).__name__}: {text_of(error)}>")

    def _repr_html_(self) -> str:
        """Return lines and a small picture, as Jupyter shows them."""
        try:
            told = self._view("telling")
        except Exception:  # noqa: BLE001 - as above
            return f"<pre>{_escaped(repr(self))}</pre>"
        rows = "".join(
            f'<tr><th style="text-align:left">{_escaped(name)}</th>'
            f'<td style="text-align:left">{_escaped(text)}</td></tr>'
            for name, text in told.brief
        )
        return (
            f"<div><strong>{_escaped(told.title)}</strong><table>{rows}</table>"
            f"{self._picture()}</div>"
        )

    def _picture(self) -> str:
        """Return the small picture as an image tag, or nothing where none can be drawn."""
        try:
            picture = importlib.import_module(_TRACKING).picture
            source = picture(functools.partial(self._view, "draw"))
        except Exception:  # noqa: BLE001 - the lines are worth showing without a picture
            return ""
        return f'<img alt="{_escaped(type(self).__name__)}" src="{source}">'

    def _on(self, ax: Axes | None, **how: Any) -> Axes:
        """Draw on axes that are given, or on new ones."""
        if ax is not None:
            self._view("draw", ax, **how)
            return ax
        from matplotlib import pyplot

        figure, ax = pyplot.subplots(layout="constrained")
        try:
            self._view("draw", ax, **how)
        except BaseException:  # an empty figure would show at the end of the cell
            pyplot.close(figure)
            raise
        return ax

    def _view(self, what: str, *given: Any, **how: Any) -> Any:
        """Return what the module of the views makes of the record."""
        return getattr(importlib.import_module(self._views), what)(self, *given, **how)


def _visible(text: str) -> str:
    from lightning_hessian.results.escaping import visible  # only what is shown pays for it

    return visible(text)


def _escaped(text: str) -> str:
    import html

    return html.escape(_visible(text))


def _text(title: str, lines: Lines) -> str:
    """Return a title and lines in two columns."""
    width = max((len(name) for name, _ in lines), default=0)
    return _visible("\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)]))

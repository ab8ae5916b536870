"""What a run shows beyond numbers: figures at a cadence and spectra, handed to its loggers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hessian.linear.rng import preserved_rng
from lightning_hessian.results import FloatArray
from lightning_hessian.results.base import text_of
from lightning_hessian.tracking.charts import rank_chart
from lightning_hessian.tracking.loggers import Adapter, Picture, adapter, write_picture, write_text
from lightning_hessian.tracking.metrics_file import NAME, MetricsFile
from lightning_hessian.tracking.spectra import decode_spectrum
from lightning_hessian.tracking.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawings = Mapping[str, Callable[[], "Figure"]]
"""Figures by name, drawn when they are called for."""

_MOST_SPECTRA = 200
"""Between so many spectra and twice as many are kept for figures, and in checkpoints."""


class Panels:
    """Hands figures and spectra to loggers, or writes them to files where these take none.

    Nothing here may cost the run: what fails ends in a warning, once for each thing that can fail.

    Args:
        prefix: Of the measurement, ``"hessian"``; keys are ``figures/<prefix>_<name>`` and
            ``spectra/<prefix>``.
        every: Figures are drawn at the first measurement, at every so many after it, and of the
            last when training ends; None for no figures and no spectra, and without a logger for
            no files at all.

    Raises:
        ValueError: ``every`` is below 1.

    Attributes:
        seconds: Wall time of drawing and handing over so far.
    """

    def __init__(self, prefix: str, every: int | None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"figures={every}; give a number of measurements from 1, or None.")
        self.prefix = prefix
        self.every = every
        self.seconds = 0.0
        self._codes: dict[int, str] = {}
        self._defined: set[tuple[int, str]] = set()
        self._identity = ""  # that the loggers know
        self._undrawn: int | None = None  # step of a measurement that no figure shows yet
        self._warned: set[str] = set()

    # State -----------------------------------------------------------------------------------

    @property
    def spectra(self) -> list[tuple[int, FloatArray]]:
        """Step and leading eigenvalues of the measurements kept, in float32 digits.

        Of a long run every second one is forgotten whenever there are 400, but the first and the
        last: the figure shows 60 at most, and each has gone to the loggers.
        """
        return [(step, decode_spectrum(code).leading) for step, code in self._codes.items()]

    def state_dict(self) -> dict[str, Any]:
        """Return the spectra so far, as texts."""
        return {"spectra": {str(step): code for step, code in self._codes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the spectra of a checkpoint.

        Raises:
            ValueError: One of them is damaged.
        """
        found = {int(step): code for step, code in state.get("spectra", {}).items()}
        for code in found.values():
            decode_spectrum(code)  # raises where it is damaged
        self._codes = found

    # Hand-over -------------------------------------------------------------------------------

    def define(self, loggers: Iterable[Any], keys: Iterable[str]) -> None:
        """Tell the loggers that want to know of keys that are about to be logged first."""
        for logger, define in _takers(loggers, "define"):
            new = [key for key in keys if (id(logger), key) not in self._defined]
            if new:
                self._try(f"defining the keys of {type(logger).__name__}", define, logger, new)
                self._defined.update((id(logger), key) for key in new)

    def add_identity(self, identity: str, step: int, loggers: Sequence[Any], folder: Path) -> None:
        """Tell the loggers, once, which fit this is, so that its records are known for one run."""
        if self.every is None or identity == self._identity:
            return
        self._identity = identity
        key = f"identity/{self.prefix}"
        with self._aside():
            self.define(loggers, [key])
            readable = [logger for logger in loggers if adapter(logger).readable_texts]
            places = self._folders(loggers, "text", folder)
            places += [
                Path(adapter(logger).folder(logger) or folder)
                for logger in loggers
                if not adapter(logger).readable_texts
            ]
            what = "the identity of the run"
            self._hand_text(what, key, identity, step, readable, dict.fromkeys(places))

    def add_spectrum(
        self, code: str, step: int, loggers: Sequence[Any], folder: Path | None
    ) -> None:
        """Keep a spectrum, the text of `encode_spectrum`, and hand it over.

        Spectra of later steps, of a run that was resumed from before them, are forgotten. Files
        that no logger has a folder for go to ``folder``, nowhere where it is None.
        """
        if self.every is None:
            return
        while self._codes and next(reversed(self._codes)) >= step:
            self._codes.popitem()
        self._codes[step] = code
        if len(self._codes) > 2 * _MOST_SPECTRA:
            self._codes = _thinned(self._codes)
        self._undrawn = step
        key = f"spectra/{self.prefix}"
        with self._aside():
            self.define(loggers, [key])
            places = self._folders(loggers, "text", folder)
            self._hand_text("a spectrum", key, code, step, loggers, places)

    def write_row(self, table: MetricsFile, step: int, values: Mapping[str, float]) -> None:
        """Write values into the table of a run without logger, where files are wanted."""
        if self.every is not None:
            with self._aside():
                self._try(f"writing {NAME}", table.add, step, values)

    def is_due(self, num_measurements: int, last: bool = False) -> bool:
        """Return whether the last measurement is to be drawn now: always where training ends."""
        if self.every is None or self._undrawn is None:
            return False
        return last or (num_measurements - 1) % self.every == 0

    def draw(self, drawings: Drawings, loggers: Sequence[Any], folder: Path | None) -> None:
        """Draw the figures of the last measurement and hand them over, as `add_spectrum` does."""
        if self._undrawn is None:
            return
        takers = _takers(loggers, "pictures")
        folders = self._folders(loggers, "pictures", folder)
        if not takers and not folders:
            return
        step, self._undrawn = self._undrawn, None
        with self._aside():
            pictures = []
            for name, drawing in drawings.items():
                key = f"figures/{self.prefix}_{name}"
                picture = self._try(f"drawing {name}", _picture, key, drawing, step)
                pictures += [] if picture is None else [picture]
            if not pictures:
                return
            self.define([logger for logger, _ in takers], [picture.key for picture in pictures])
            for logger, hand_over in takers:
                what = f"logging figures to {type(logger).__name__}"
                self._try(what, hand_over, logger, pictures, step)
            self._draw_chart(step, loggers)
            for place in folders:
                for picture in pictures:
                    self._try("writing figures", write_picture, place, picture)

    # Inside ----------------------------------------------------------------------------------

    def _draw_chart(self, step: int, loggers: Iterable[Any]) -> None:
        """Give the last spectrum to the loggers that draw charts themselves."""
        takers = _takers(loggers, "chart")
        if not takers or step not in self._codes:
            return
        leading = decode_spectrum(self._codes[step]).leading
        chart = self._try("preparing a chart", rank_chart, self.prefix, leading, step)
        if chart is None:
            return
        for logger, hand_over in takers:
            self.define([logger], [f"{chart.key}_table"])
            self._try(f"logging a chart to {type(logger).__name__}", hand_over, logger, chart, step)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Count the time, and leave the random numbers of training alone, whoever draws some."""
        started = time.monotonic()
        try:
            with preserved_rng():
                yield
        finally:
            self.seconds += time.monotonic() - started

    def _hand_text(
        self,
        what: str,
        key: str,
        value: str,
        step: int,
        loggers: Sequence[Any],
        places: Iterable[Path],
    ) -> None:
        """Give a text to the loggers that take texts, and write it to the places."""
        for logger, take in _takers(loggers, "text"):
            self._try(f"logging {what} to {type(logger).__name__}", take, logger, key, value, step)
        for place in places:
            self._try(f"writing {what}", write_text, place, key, value, step)

    def _folders(self, loggers: Sequence[Any], what: str, default: Path | None) -> list[Path]:
        """Return the folders, each once, of the loggers for whom files stand in."""
        rows: list[tuple[Any, Adapter]] = [(logger, adapter(logger)) for logger in loggers]
        left = [(x, row) for x, row in rows if getattr(row, what) is None and row.takes_files]
        places = [default] if not loggers else []
        for logger, row in left:
            named = f"finding the folder of {type(logger).__name__}"
            places.append(self._try(named, _folder_of, row, logger) or default)
        return [place for place in dict.fromkeys(places) if place is not None]

    def _try(self, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result, or None after a warning: no figure is worth a lost run."""
        try:
            return action(*arguments)
        except Exception as error:  # noqa: BLE001 - told, once for each thing that failed
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(
                    f"Training goes on, but {what} failed "
                    f"({type(error).__name__}: {text_of(error)}). "
                    "Leave figures out with figures=None.",
                    stacklevel=4,
                )
            return None


def _takers(loggers: Iterable[Any], what: str) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the loggers that take pictures, texts or definitions, each with what takes them."""
    found = [(logger, getattr(adapter(logger), what)) for logger in loggers]
    return [(logger, take) for logger, take in found if take is not None]


def _thinned(codes: dict[int, str]) -> dict[int, str]:
    """Return every second spectrum, the first and the last among them."""
    steps = list(codes)
    return {step: codes[step] for i, step in enumerate(steps) if i % 2 == 0 or step == steps[-1]}


def _folder_of(row: Adapter, logger: Any) -> Path | None:
    place = row.folder(logger)
    return None if place is None else Path(place)


def _picture(key: str, drawing: Callable[[], Figure], step: int) -> Picture:
    return Picture(key, render(drawing()), step)

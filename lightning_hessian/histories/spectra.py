"""The spectra of a run, read back from where its loggers put them."""

from __future__ import annotations

import math
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hessian.histories.offline_run import OfflineRun, read_offline_run
from lightning_hessian.results import UnreadableFileError, arguments, bounds
from lightning_hessian.results.outside import (
    Problems,
    inside,
    parse_json,
    printable,
    read_bounded,
    reason,
    unreadable,
)
from lightning_hessian.results.path_arguments import path_name
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.spectra import StoredSpectrum, decode_spectrum

Spectra = dict[str, list[tuple[int, StoredSpectrum]]]
"""By what was measured (``"hessian"``, ``"gradient"``): step and spectrum, in order of steps."""


@arguments.checked({"path": path_name})
def read_spectra(path: str | PathLike[str]) -> Spectra:
    """Return the spectra of all measurements of a run.

    Steps are those of the logger, counted from 0 as Lightning does, so that a spectrum belongs to
    the row of the same step. Of steps that repeat, after a resume, the last is kept. A line or a
    text that is torn (a run was killed while it wrote) is left out with a warning.

    Args:
        path: An offline W&B run as `read_offline_run` takes it, or a folder with the files
            ``spectra_<what>.jsonl`` that stand in where a logger takes no texts (CSV, none), or
            one of these files.

    Raises:
        FileNotFoundError: There are none at this path.
        UnreadableFileError: A file has not one spectrum that can be read; a ValueError.

    Example:
        >>> read_spectra("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere does not exist; pass the folder of a run
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; pass the folder of a run")
    files = [place] if place.suffix == ".jsonl" else sorted(place.glob("spectra_*.jsonl"))
    if not files:
        return spectra_of(read_offline_run(place))
    found: Spectra = {}
    problems = Problems()
    for file in files:
        if file != place:
            inside(file, place)
        with unreadable(file):
            what = printable(file.stem.removeprefix("spectra_"), bounds.NAME_LENGTH)
            found[what] = _of_lines(file, f"spectra/{what}", problems)
    _warn(problems, place)
    return found


def _of_lines(file: Path, key: str, problems: Problems) -> list[tuple[int, StoredSpectrum]]:
    """Return the spectra in the lines of a file; a line that is none costs that line."""
    steps: dict[int, StoredSpectrum] = {}
    lost = 0
    text = read_bounded(file, bounds.RUN_FILE_BYTES).decode("utf-8", errors="replace")
    # Lines end where `write_text` ends them: within JSON there is no bare line feed.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            steps[_step(row["step"])] = decode_spectrum(row[key])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            lost += 1
            problems.append(f"{file.name}, line {number}: {reason(error)}")
    if lost and not steps:
        raise UnreadableFileError(f"{file} has not one spectrum that can be read: {problems[-1]}")
    return sorted(steps.items())


def _step(value: Any) -> int:
    """Return a step as a whole number; raise ValueError where it is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 2**63:
        raise ValueError(f"the step is {printable(repr(value), 60)}")
    return int(value)


def _warn(problems: Problems, what: object) -> None:
    told = problems.told()
    if told:
        warnings.warn(
            f"{what}: {len(problems) + problems.more} spectra left out: {'; '.join(told[:5])}",
            stacklevel=3,
        )


def spectra_of(run: OfflineRun, problems: list[str] | None = None) -> Spectra:
    """Return the spectra in the rows of an offline W&B run.

    Args:
        run: That of `read_offline_run`.
        problems: A sentence is added for each text that is damaged or of a later version, which is
            left out; without a list there is a warning.

    Raises:
        UnreadableFileError: There are such texts, and not one can be read; a ValueError.
    """
    found: dict[str, dict[int, StoredSpectrum]] = {}
    told = Problems()
    for row in run.rows:
        for key, value in row.items():
            if not (key.startswith("spectra/") and isinstance(value, str) and STEP in row):
                continue
            try:
                step, spectrum = _step(row[STEP]), decode_spectrum(value)
            except ValueError as error:
                where = f"{key} at step {printable(str(row[STEP]), 60)}"
                told.append(f"some of the spectra cannot be shown: {where}: {reason(error)}")
                continue
            found.setdefault(key.removeprefix("spectra/"), {})[step] = spectrum
    if told and not found:
        raise UnreadableFileError(f"not one spectrum can be read: {told[-1]}")
    if problems is None:
        _warn(told, run.name or run.run_id)
    else:
        problems += told.told()
    return {what: sorted(steps.items()) for what, steps in found.items()}

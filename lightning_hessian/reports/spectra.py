"""The spectra of a run, read back from where its loggers put them."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from lightning_hessian.reports.offline_run import OfflineRun, read_offline_run
from lightning_hessian.results import arguments
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.spectra import StoredSpectrum, decode_spectrum

Spectra = dict[str, list[tuple[int, StoredSpectrum]]]
"""By what was measured (``"hessian"``, ``"gradient"``): step and spectrum, in order of steps."""


@arguments.checked({"path": arguments.path_name})
def read_spectra(path: str | PathLike[str]) -> Spectra:
    """Returns the spectra of all measurements of a run.

    Steps are those of the logger, counted from 0 as Lightning does, so that a spectrum belongs to
    the row of the same step. Of steps that repeat, after a resume, the last is kept.

    Args:
        path: An offline W&B run as `read_offline_run` takes it, or a folder with the files
            ``spectra_<what>.jsonl`` that stand in where a logger takes no texts (CSV, none), or
            one of these files.

    Raises:
        FileNotFoundError: There are none at this path.
        ValueError: A file is damaged, or of a later version.

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
    for file in files:
        what = file.stem.removeprefix("spectra_")
        steps = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            steps[int(row["step"])] = decode_spectrum(row[f"spectra/{what}"])
        found[what] = sorted(steps.items())
    return found


def spectra_of(run: OfflineRun) -> Spectra:
    """Returns the spectra in the rows of an offline W&B run.

    Args:
        run: That of `read_offline_run`.

    Raises:
        ValueError: A text is damaged, or of a later version.
    """
    found: dict[str, dict[int, StoredSpectrum]] = {}
    for row in run.rows:
        for key, value in row.items():
            if key.startswith("spectra/") and isinstance(value, str) and STEP in row:
                steps = found.setdefault(key.removeprefix("spectra/"), {})
                steps[int(row[STEP])] = decode_spectrum(value)
    return {what: sorted(steps.items()) for what, steps in found.items()}

"""The output folder of `lightning-hessian measure`: what is done, and the tables made of it."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from lightning_hessian.cli.watching import Version, version_of
from lightning_hessian.histories.marks import MARK
from lightning_hessian.results import HessianSpectrum, UnreadableFileError
from lightning_hessian.results.files import load_extra, load_spectrum
from lightning_hessian.results.output import atomic_write
from lightning_hessian.results.outside import unreadable
from lightning_hessian.tracking.spectra import encode_spectrum

TABLES = ("metrics.csv", "spectra_hessian.jsonl", "hparams.yaml")
"""The files that are made of what is in ``spectra/``."""

_SETTINGS = (
    "module", "data", "module_arg", "data_arg", "split", "num_batches", "num_eigenvalues",
    "parameters", "loss", "protocol", "tol", "max_products", "max_seconds", "hvp", "matrix",
    "trace_probes", "seed",
)  # fmt: skip
"""The options that make another measurement of it."""


def say(text: str) -> None:
    """Say a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that make another measurement of it."""
    return {name: getattr(options, name) for name in _SETTINGS}


def source_of(version: Version, weights: str) -> dict[str, Any]:
    """Return what tells whether a checkpoint has changed, and its weights with it."""
    size, modified = version.bytes, version.modified
    return {"path": str(version.path), "bytes": size, "modified": modified, "weights": weights}


def is_done(file: Path, path: Path, options: argparse.Namespace) -> bool:
    """Whether a file holds this very measurement; raise where it holds another."""
    try:
        extra = extra_of(file)
    except (UnreadableFileError, OSError) as error:
        say(f"{error} It is measured again.")
        return False
    check_settings(extra["settings"], options)
    try:
        source, now = extra["source"], version_of(path)
    except OSError:
        return False  # which then is why it cannot be measured
    if (source["bytes"], source["modified"]) == (now.bytes, now.modified):
        return True
    file.with_suffix(".lanczos").unlink(missing_ok=True)
    return False


def check_settings(theirs: dict[str, Any], options: argparse.Namespace) -> None:
    """Check that what was measured before was measured with the same arguments."""
    ours = json.loads(json.dumps(settings_of(options)))
    theirs = {"matrix": "hessian"} | theirs  # which older folders do not name
    different = [
        f"{name} {theirs.get(name)!r} there, {value!r} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{options.out} holds measurements with other arguments ({'; '.join(different)}). Give "
            "another --out, or --again."
        )


def measured_beside_a_run(options: argparse.Namespace) -> dict[int, str]:
    """Return the weights that a sidecar has measured, by step; none where no sidecar has."""
    found: dict[int, str] = {}
    out: Path = options.out
    for file in (out / "spectra").glob("*.npz") if (out / MARK).exists() else ():
        try:
            extra = extra_of(file)
        except (UnreadableFileError, OSError):
            continue  # it is named when the tables are written
        check_settings(extra["settings"], options)
        found[extra["row"]["step"]] = extra["source"]["weights"]
    return found


def extra_of(file: Path) -> dict[str, Any]:
    """Return what a file of ours keeps beside its spectrum, its parts checked."""
    extra = load_extra(file)
    with unreadable(file, "Delete it and measure again."):
        for part in ("settings", "source", "row", "hparams"):
            extra[part] = dict(extra[part])
        if not all(isinstance(extra["source"][name], int) for name in ("bytes", "modified")):
            raise TypeError("its source")
        extra["row"]["step"] = int(extra["row"]["step"])
        for part in ("path", "weights"):
            extra["source"][part] = str(extra["source"][part])
    return extra


def write_tables(out: Path) -> dict[Path, str]:
    """Write ``metrics.csv``, ``spectra_hessian.jsonl`` and ``hparams.yaml`` from what is done.

    Returns the files that are left out, and why: damaged, or of a step that another has too.
    """
    found: dict[int, tuple[dict[str, Any], HessianSpectrum]] = {}
    left_out: dict[Path, str] = {}
    # Of two of one step the one that was measured first stays.
    measured = (out / "spectra").glob("*.npz")
    for file in sorted(measured, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        try:
            extra, spectrum = extra_of(file), load_spectrum(file)
        except (UnreadableFileError, OSError) as error:
            left_out[file] = str(error)
            continue
        step = extra["row"]["step"]
        if step in found:
            left_out[file] = (
                f"{found[step][0]['source']['path']} and {extra['source']['path']} are both of "
                f"step {step}, and {out} is for one run. Give each run an --out of its own (and "
                f"delete {file})."
            )
        else:
            found[step] = extra, spectrum
    if not found:
        return left_out
    ordered = [found[step] for step in sorted(found)]
    rows = [extra["row"] for extra, _ in ordered]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, names)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out / "metrics.csv") as written:
        written.write(table.getvalue().encode(errors="replace"))
    with atomic_write(out / "spectra_hessian.jsonl") as written:
        for extra, spectrum in ordered:
            text = encode_spectrum(spectrum.eigenvalues, spectrum.residuals, spectrum.converged)
            line = json.dumps({"step": extra["row"]["step"], "spectra/hessian": text})
            written.write(line.encode() + b"\n")
    if hparams := ordered[-1][0]["hparams"]:
        from lightning.pytorch.core.saving import save_hparams_to_yaml

        save_hparams_to_yaml(str(out / "hparams.yaml"), hparams)
    return left_out

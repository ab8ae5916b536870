"""The work of `lightning-hessian measure`: checkpoints in, a folder of spectra and metrics out."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_hessian.cli import loading
from lightning_hessian.cli.checkpoints import find_checkpoints, read_checkpoint
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import PooledSLQ
from lightning_hessian.measure.spectrum import hessian_spectrum
from lightning_hessian.results import (
    ArgumentError,
    HessianSpectrum,
    MeasurementError,
    UnreadableFileError,
)
from lightning_hessian.results.files import load_extra, load_spectrum, save_spectrum
from lightning_hessian.results.output import atomic_write, check_folder
from lightning_hessian.results.outside import reason, unreadable
from lightning_hessian.tracking.scalars import spectrum_scalars
from lightning_hessian.tracking.spectra import encode_spectrum

_SETTINGS = (
    "module", "data", "module_arg", "data_arg", "split", "num_batches", "num_eigenvalues",
    "parameters", "loss", "protocol", "tol", "max_hvps", "hvp", "trace_probes", "seed",
)  # fmt: skip
"""The options that make another measurement of it."""


def measure_checkpoints(options: argparse.Namespace) -> int:
    """Measure what has not been measured yet, and say on stderr how far it is.

    A checkpoint that cannot be read or measured, whatever the reason, does not stop the others; it
    is named at the end.

    Returns:
        The exit code: 0, or 1 where some of the checkpoints could not be measured.
    """
    paths = find_checkpoints(options.checkpoints)
    check_folder(options.out, files=("metrics.csv", "spectra_hessian.jsonl", "hparams.yaml"))
    cls = loading.module_class(options)
    for text in filter(None, (options.loss, options.data)):
        loading.named(text)  # a wrong name is told before anything is loaded
    folder = options.out / "spectra"
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Path, str] = {}
    begun = time.monotonic()
    measured = 0
    files = _files(paths, folder)
    for place, path in enumerate(paths):
        file, label = files[path], f"{path.name} ({place + 1} of {len(paths)})"
        if file.exists() and not options.again and _is_done(file, path, options):
            _say(f"{label}: measured before")
            continue
        try:
            _measure(path, file, label, cls, options)
            measured += 1
        except KeyboardInterrupt:
            _say(f"\nlightning-hessian: stopped at {label}; run the same command again to go on.")
            raise SystemExit(130) from None
        except ArgumentError:
            raise  # it would be the same at every other checkpoint
        except Exception as error:  # noqa: BLE001 - the file, the module, the data: all the user's
            failed[path] = _why(error)
            if len(paths) > 1:
                _say(f"{label}: not measured: {failed[path]}")
        if failed and options.device.type == "cuda":
            torch.cuda.empty_cache()
        _write_tables(options.out)
    left_out = _write_tables(options.out)
    failed |= {path: left_out[file] for path, file in files.items() if file in left_out}
    for file in left_out.keys() - files.values():
        _say(f"left out of the tables: {left_out[file]}")
    code = _told_at_the_end(failed, len(paths))
    rows, seconds = len(list(folder.glob("*.npz"))) - len(left_out), time.monotonic() - begun
    _say(f"{measured} measured in {seconds:.0f} s; {options.out / 'metrics.csv'} has {rows} rows")
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _told_at_the_end(failed: dict[Path, str], count: int) -> int:
    """Return the exit code, after naming the checkpoints that failed; raise where all did."""
    if not failed:
        return 0
    named = "; ".join(
        text if str(path) in text else f"{path}: {text}" for path, text in failed.items()
    )
    if count == 1:
        raise ValueError(named)
    told = f"{len(failed)} of {count} could not be measured. {named}"
    if len(failed) == count:
        raise ValueError(told)
    _say(f"lightning-hessian: {told}")
    return 1


def _why(error: Exception) -> str:
    """Return in one line why a checkpoint could not be measured, with a remedy for memory."""
    ours = isinstance(error, (ValueError, MeasurementError))
    text = " ".join(str(error).split()) if ours else reason(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in text.lower():
        return f"{text} Give fewer --num-batches, some --parameters, or another --device."
    return text


def _measure(path: Path, file: Path, label: str, cls: Any, options: argparse.Namespace) -> None:
    """Measure one checkpoint, and write its file."""
    saved = read_checkpoint(path, trust=options.trust)
    module = loading.module_of(cls, saved, options).to(options.device)
    data = loading.data_of(saved, options)
    batches = loading.batches_of(module, data, options)
    row: dict[str, Any] = {"step": 0, "epoch": 0, **saved.metrics}
    row |= {"step": saved.step, "epoch": saved.epoch}  # whatever was monitored under that name
    if options.validate:
        row |= loading.validation_metrics(module, data)
    state = file.with_suffix(".lanczos")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = hessian_spectrum(
            module,
            None if options.loss is None else loading.named(options.loss),
            batches,
            num_eigenvalues=options.num_eigenvalues,
            parameters=options.parameters,
            protocol="converged" if options.protocol == "converged" else PooledSLQ(),
            tol=options.tol,
            budget=Budget(products=options.max_hvps),
            hvp=options.hvp,
            trace_probes=options.trace_probes,
            checkpoint=state if options.protocol == "converged" else None,
            on_progress=_Line(label).show,
            seed=options.seed,
        )
    scalars, absent = spectrum_scalars(spectrum)
    row |= {f"hessian/{name}": value for name, value in scalars.items()}
    row["probe_loss"] = spectrum.loss
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    notes += [*absent, *saved.problems]
    for note in dict.fromkeys(notes):
        _say(f"{label}: {note}")
    extra = {"settings": _settings(options), "source": _source(path), "row": row}
    save_spectrum(spectrum, file, extra | {"hparams": saved.hparams, "notes": notes})
    state.unlink(missing_ok=True)  # it is kept where a bound on products ended the run
    _say(
        f"{label}: step {saved.step}, {spectrum.num_converged} of {len(spectrum.eigenvalues)} "
        f"converged, {spectrum.num_hvps} products, {spectrum.seconds:.1f} s"
    )


class _Line:
    """One line of progress on a terminal; nothing elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.last = time.monotonic()

    def show(self, num_products: int, num_converged: int | None) -> None:
        """Show the number of products and of eigenvalues known to have converged."""
        if not sys.stderr.isatty() or time.monotonic() - self.last < 0.2:
            return
        self.last = time.monotonic()
        found = "" if num_converged is None else f", {num_converged} eigenvalues"
        print(f"\r{self.label}: {num_products} products{found} ", end="", file=sys.stderr)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SETTINGS}


def _source(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"path": str(path), "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _files(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Return where each checkpoint's spectrum goes: by name, with folders where names repeat."""
    names = [path.stem for path in paths]
    found = {}
    for path in paths:
        parts = path.absolute().parts[-3:-1] if names.count(path.stem) > 1 else ()
        found[path] = folder / ("-".join((*parts, path.stem)) + ".npz")
    return found


def _is_done(file: Path, path: Path, options: argparse.Namespace) -> bool:
    """Whether a file holds this very measurement; raise where it holds another."""
    try:
        extra = _extra(file)
    except (UnreadableFileError, OSError) as error:
        _say(f"{error} It is measured again.")
        return False
    theirs, ours = extra["settings"], json.loads(json.dumps(_settings(options)))
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
    try:
        source, now = extra["source"], _source(path)
    except OSError:
        return False  # which then is why it cannot be measured
    if (source["bytes"], source["modified"]) == (now["bytes"], now["modified"]):
        return True
    file.with_suffix(".lanczos").unlink(missing_ok=True)
    return False


def _extra(file: Path) -> dict[str, Any]:
    """Return what a file of ours keeps beside its spectrum, its parts checked."""
    extra = load_extra(file)
    with unreadable(file, "Delete it and measure again."):
        for part in ("settings", "source", "row", "hparams"):
            extra[part] = dict(extra[part])
        if not all(isinstance(extra["source"][name], int) for name in ("bytes", "modified")):
            raise TypeError("its source")
        extra["row"]["step"] = int(extra["row"]["step"])
        extra["source"]["path"] = str(extra["source"]["path"])
    return extra


def _write_tables(out: Path) -> dict[Path, str]:
    """Write ``metrics.csv``, ``spectra_hessian.jsonl`` and ``hparams.yaml`` from what is done.

    Returns the files that are left out, and why: damaged, or of a step that another has too.
    """
    found: dict[int, tuple[dict[str, Any], HessianSpectrum]] = {}
    left_out: dict[Path, str] = {}
    # Of two of one step the one that was measured first stays.
    measured = (out / "spectra").glob("*.npz")
    for file in sorted(measured, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        try:
            extra, spectrum = _extra(file), load_spectrum(file)
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

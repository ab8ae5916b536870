"""The work of `lightning-hessian measure`: checkpoints in, a folder of spectra and metrics out."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_hessian.commands.loading import (
    batches_of,
    data_of,
    find_checkpoints,
    module_of,
    named,
    read_checkpoint,
    validation_metrics,
)
from lightning_hessian.measure import hessian_spectrum
from lightning_hessian.results import MeasurementError
from lightning_hessian.results.files import load_extra, load_spectrum, save_spectrum
from lightning_hessian.tracking.scalars import spectrum_scalars
from lightning_hessian.tracking.spectra import encode_spectrum

_SETTINGS = (
    "module", "data", "module_arg", "data_arg", "split", "num_batches", "num_eigenvalues",
    "parameters", "loss", "protocol", "tol", "max_hvps", "hvp", "trace_probes", "seed",
)  # fmt: skip
"""The options that make another measurement of it."""


def measure_checkpoints(options: argparse.Namespace) -> None:
    """Measures what has not been measured yet, and says on stderr how far it is.

    Args:
        options: Those of the command, `--module-arg` and `--data-arg` as mappings.

    Raises:
        ValueError: An argument that is wrong, a folder with other measurements, or checkpoints
            that could not be measured; the others have been.
        FileNotFoundError: There is no such checkpoint.
    """
    paths = find_checkpoints(options.checkpoints)
    named(options.module)  # before anything is read
    folder = options.out / "spectra"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    failed = []
    begun = time.monotonic()
    measured = 0
    files = _files(paths, folder)
    for place, path in enumerate(paths):
        file, label = files[path], f"{path.name} ({place + 1} of {len(paths)})"
        if file.exists() and not options.again and _is_done(file, path, settings, options.out):
            print(f"{label}: measured before", file=sys.stderr)
            continue
        try:
            _measure(path, file, label, settings, options)
            measured += 1
        except KeyboardInterrupt:
            print(
                f"\nlightning-hessian: stopped at {label}; run the same command again to go on.",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
        except MeasurementError as error:
            failed.append(f"{path}: {error}")
            print(f"{label}: not measured: {error}", file=sys.stderr)
        _write_tables(options.out)
    _write_tables(options.out)
    print(
        f"{measured} measured in {time.monotonic() - begun:.0f} s; {options.out / 'metrics.csv'} "
        f"has {len(list(folder.glob('*.npz')))} rows",
        file=sys.stderr,
    )
    if failed:
        raise ValueError(f"{len(failed)} of {len(paths)} could not be measured. {failed[0]}")


def _measure(
    path: Path, file: Path, label: str, settings: dict[str, Any], options: argparse.Namespace
) -> None:
    """Measures one checkpoint, and writes its file."""
    saved = read_checkpoint(path, trust=options.trust)
    device = torch.device(options.device)
    module = module_of(named(options.module), saved, options).to(device)
    data = data_of(options.data, saved, options)
    batches = batches_of(module, data, options, device)
    row: dict[str, Any] = {"step": saved.step, "epoch": saved.epoch, **saved.metrics}
    if options.validate:
        row |= validation_metrics(module, data)
    state = file.with_suffix(".lanczos")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = hessian_spectrum(
            module,
            None if options.loss is None else named(options.loss),
            batches,
            num_eigenvalues=options.num_eigenvalues,
            parameters=options.parameters,
            protocol=options.protocol,
            tol=options.tol,
            max_hvps=options.max_hvps,
            hvp=options.hvp,
            trace_probes=options.trace_probes,
            checkpoint=state if options.protocol == "converged" else None,
            on_progress=_Line(label).show,
            seed=options.seed,
        )
    scalars, absent = spectrum_scalars(spectrum)
    row |= {f"hessian/{name}": value for name, value in scalars.items()}
    row["probe_loss"] = spectrum.loss
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)] + absent
    for note in dict.fromkeys(notes):
        print(f"{label}: {note}", file=sys.stderr)
    extra = {
        "settings": settings,
        "source": _source(path),
        "row": row,
        "hparams": saved.hparams,
        "notes": notes,
    }
    save_spectrum(spectrum, file, extra)
    state.unlink(missing_ok=True)  # it is kept where a bound on products ended the run
    print(
        f"{label}: step {saved.step}, {spectrum.num_converged} of {len(spectrum.eigenvalues)} "
        f"converged, {spectrum.num_hvps} products, {spectrum.seconds:.1f} s",
        file=sys.stderr,
    )


class _Line:
    """One line of progress on a terminal; nothing elsewhere."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.last = time.monotonic()

    def show(self, num_products: int, num_converged: int | None) -> None:
        """Shows the number of products and of eigenvalues known to have converged."""
        if not sys.stderr.isatty() or time.monotonic() - self.last < 0.2:
            return
        self.last = time.monotonic()
        found = "" if num_converged is None else f", {num_converged} eigenvalues"
        print(f"\r{self.label}: {num_products} products{found} ", end="", file=sys.stderr)


def _files(paths: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """Returns where each checkpoint's spectrum goes: by name, with folders where names repeat."""
    paths = list(paths)
    names = [path.stem for path in paths]
    found = {}
    for path in paths:
        parts = path.absolute().parts[-3:-1] if names.count(path.stem) > 1 else ()
        found[path] = folder / ("-".join((*parts, path.stem)) + ".npz")
    return found


def _source(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"path": str(path), "bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _is_done(file: Path, path: Path, settings: dict[str, Any], out: Path) -> bool:
    """Whether a file holds this very measurement.

    Raises:
        ValueError: It holds another one.
    """
    extra = load_extra(file)
    theirs = extra["settings"]
    ours = json.loads(json.dumps(settings))
    different = [
        f"{name} {theirs.get(name)!r} there, {value!r} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{out} holds measurements with other arguments ({'; '.join(different)}). Give "
            "another --out, or --again."
        )
    source, now = extra["source"], _source(path)
    if (source["bytes"], source["modified"]) == (now["bytes"], now["modified"]):
        return True
    file.with_suffix(".lanczos").unlink(missing_ok=True)
    return False


def _write_tables(out: Path) -> None:
    """Writes ``metrics.csv``, ``spectra_hessian.jsonl`` and ``hparams.yaml`` from what is done.

    Raises:
        ValueError: Two checkpoints are of the same step: they are of different runs.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for file in sorted((out / "spectra").glob("*.npz")):
        extra = load_extra(file)
        step = int(extra["row"]["step"])
        if step in found:
            raise ValueError(
                f"{found[step][1]['source']['path']} and {extra['source']['path']} are both of "
                f"step {step}, and {out} is for one run. Give each run an --out of its own (and "
                f"delete {file})."
            )
        found[step] = file, extra
    if not found:
        return
    ordered = [found[step] for step in sorted(found)]
    rows = [extra["row"] for _, extra in ordered]
    names = list(dict.fromkeys(name for row in rows for name in row))

    def write_rows(file: Any) -> None:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)

    def write_spectra(file: Any) -> None:
        for path, extra in ordered:
            spectrum = load_spectrum(path)
            text = encode_spectrum(spectrum.eigenvalues, spectrum.residuals, spectrum.converged)
            file.write(json.dumps({"step": extra["row"]["step"], "spectra/hessian": text}) + "\n")

    _replaced(out / "metrics.csv", write_rows)
    _replaced(out / "spectra_hessian.jsonl", write_spectra)
    if hparams := ordered[-1][1]["hparams"]:
        from lightning.pytorch.core.saving import save_hparams_to_yaml

        save_hparams_to_yaml(str(out / "hparams.yaml"), hparams)


def _replaced(path: Path, write: Callable[[Any], None]) -> None:
    """Writes a text file as a whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        write(file)
    os.replace(temporary, path)

"""The work of `lightning-hessian measure`: checkpoints in, a folder of spectra and metrics out."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_hessian.cli import loading
from lightning_hessian.cli.checkpoints import (
    Saved,
    copy_checkpoint,
    find_checkpoints,
    read_checkpoint,
)
from lightning_hessian.cli.sharded_checkpoints import is_sharded
from lightning_hessian.cli.spectra_folder import (
    TABLES,
    is_done,
    measured_beside_a_run,
    say,
    settings_of,
    source_of,
    write_tables,
)
from lightning_hessian.cli.watching import Version, version_of
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import PooledSLQ
from lightning_hessian.measure.spectrum import hessian_spectrum
from lightning_hessian.results import ArgumentError, HessianSpectrum, MeasurementError
from lightning_hessian.results.files import save_spectrum
from lightning_hessian.results.output import check_folder
from lightning_hessian.results.outside import reason
from lightning_hessian.tracking.scalars import spectrum_scalars


def measure_checkpoints(options: argparse.Namespace) -> int:
    """Measure what has not been measured yet, and say on stderr how far it is.

    A checkpoint that cannot be read or measured, whatever the reason, does not stop the others; it
    is named at the end.

    Returns:
        The exit code: 0, or 1 where some of the checkpoints could not be measured.
    """
    paths = find_checkpoints(options.checkpoints)
    cls = prepared(options)
    folder = options.out / "spectra"
    failed: dict[Path, str] = {}
    begun = time.monotonic()
    measured = 0
    files = _files(paths, folder)
    followed = {} if options.again else measured_beside_a_run(options)
    for place, path in enumerate(paths):
        file, label = files[path], f"{path.name} ({place + 1} of {len(paths)})"
        if file.exists() and not options.again and is_done(file, path, options):
            say(f"{label}: measured before")
            continue
        try:
            version = version_of(path)
            with _in_one_file(path, options) as whole:
                saved = read_checkpoint(whole, trust=options.trust)
                if saved.weights == followed.get(saved.step):
                    say(f"{label}: measured before, under another name")
                    continue
                for note in measure_checkpoint(saved, version, file, label, cls, options):
                    say(f"{label}: {note}")
            measured += 1
        except KeyboardInterrupt:
            say(f"\nlightning-hessian: stopped at {label}; run the same command again to go on.")
            raise SystemExit(130) from None
        except ArgumentError:
            raise  # it would be the same at every other checkpoint
        except Exception as error:  # noqa: BLE001 - the file, the module, the data: all the user's
            failed[path] = why(error)
            if len(paths) > 1:
                say(f"{label}: not measured: {failed[path]}")
        if failed and options.device.type == "cuda":
            torch.cuda.empty_cache()
        write_tables(options.out)
    left_out = write_tables(options.out)
    failed |= {path: left_out[file] for path, file in files.items() if file in left_out}
    for file in left_out.keys() - files.values():
        say(f"left out of the tables: {left_out[file]}")
    code = told_at_the_end(failed, len(paths))
    rows, seconds = len(list(folder.glob("*.npz"))) - len(left_out), time.monotonic() - begun
    say(f"{measured} measured in {seconds:.0f} s; {options.out / 'metrics.csv'} has {rows} rows")
    return code


def told_at_the_end(failed: dict[Path, str], count: int) -> int:
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
    say(f"lightning-hessian: {told}")
    return 1


def why(error: Exception) -> str:
    """Return in one line why a checkpoint could not be measured, with a remedy for memory."""
    ours = isinstance(error, (ValueError, MeasurementError))
    text = " ".join(str(error).split()) if ours else reason(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in text.lower():
        return f"{text} Give fewer --num-batches, some --parameters, or another --device."
    return text


def prepared(options: argparse.Namespace) -> Any:
    """Return the class of the module, once all names and the output folder have been checked."""
    check_folder(options.out, files=TABLES)
    cls = loading.module_class(options)
    for text in filter(None, (options.loss, options.data)):
        loading.named(text)  # a wrong name is told before anything is loaded
    folder = options.out / "spectra"
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return cls


@contextmanager
def _in_one_file(path: Path, options: argparse.Namespace) -> Iterator[Path]:
    """Return a block with the checkpoint in one file: itself, or what its ranks' parts make."""
    if not is_sharded(path):
        yield path
        return
    folder = Path(tempfile.mkdtemp(prefix="whole-", dir=options.out))
    try:
        copy_checkpoint(path, folder / path.name, trust=options.trust)
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_checkpoint(
    saved: Saved,
    version: Version,
    file: Path,
    label: str,
    cls: Any,
    options: argparse.Namespace,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[str]:
    """Measure one checkpoint, write its file, and return what is to be told about it.

    Args:
        saved: What was read of it; its ``path`` is loaded, which may be a copy.
        version: The checkpoint itself, which is kept beside the spectrum.
        file: Where the spectrum goes.
        label: What the checkpoint is called on the terminal.
        cls: The class of its module.
        options: Those of the command.
        meanwhile: Called after every product.
    """
    module = loading.module_of(cls, saved, options).to(options.device)
    data = loading.data_of(saved, options)
    batches = loading.batches_of(module, data, options)
    counts = {"step": saved.step, "logged_step": saved.logged_step, "epoch": saved.epoch}
    # First in the row, whatever was monitored under these names.
    row: dict[str, Any] = counts | saved.metrics | counts
    if options.validate:
        row |= loading.validation_metrics(module, data)
    line, state = _Line(label), file.with_suffix(".lanczos")

    def show(num_products: int, num_converged: int | None) -> None:
        line.show(num_products, num_converged)
        meanwhile()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spectrum = _spectrum_of(module, batches, state, show, options)
    scalars, absent = spectrum_scalars(spectrum)
    row |= {f"hessian/{name}": value for name, value in scalars.items()}
    row["probe_loss"] = spectrum.loss
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    notes += [*absent, *saved.problems]
    source = source_of(version, saved.weights)
    extra = {"settings": settings_of(options), "source": source, "row": row}
    save_spectrum(spectrum, file, extra | {"hparams": saved.hparams, "notes": notes})
    state.unlink(missing_ok=True)  # it is kept where a bound on products ended the run
    say(
        f"{label}: step {saved.step}, {spectrum.num_converged} of {len(spectrum.eigenvalues)} "
        f"converged, {spectrum.num_hvps} products, {spectrum.seconds:.1f} s"
    )
    return list(dict.fromkeys(notes))


def _spectrum_of(
    module: Any,
    batches: list[Any],
    state: Path,
    show: Callable[[int, int | None], None],
    options: argparse.Namespace,
) -> HessianSpectrum:
    converged = options.protocol == "converged"
    return hessian_spectrum(
        module,
        None if options.loss is None else loading.named(options.loss),
        batches,
        num_eigenvalues=options.num_eigenvalues,
        parameters=options.parameters,
        protocol="converged" if converged else PooledSLQ(),
        tol=options.tol,
        budget=Budget(products=options.max_products, seconds=options.max_seconds),
        hvp=options.hvp,
        matrix=options.matrix,
        trace_probes=options.trace_probes,
        checkpoint=state if converged else None,
        on_progress=show,
        seed=options.seed,
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


def _files(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """Return where each checkpoint's spectrum goes: by name, with folders where names repeat."""
    names = [path.stem for path in paths]
    found = {}
    for path in paths:
        parts = path.absolute().parts[-3:-1] if names.count(path.stem) > 1 else ()
        found[path] = folder / ("-".join((*parts, path.stem)) + ".npz")
    return found

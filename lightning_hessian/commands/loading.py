"""From names on the command line and a checkpoint to a module and its probe batches."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_hessian.probe.arguments import batches
from lightning_hessian.probe.isolation import preserved_rng, seed_everything
from lightning_hessian.probe.samples import draw_batches

LIBRARIES: list[Any] = [L]
"""Lightning under either of its names, where they are installed."""

if importlib.util.find_spec("pytorch_lightning") is not None:
    LIBRARIES.append(importlib.import_module("pytorch_lightning"))

MODULES = tuple(library.LightningModule for library in LIBRARIES)
DATA_MODULES = tuple(library.LightningDataModule for library in LIBRARIES)


@dataclass(frozen=True)
class Saved:
    """What is read of a checkpoint beside its weights.

    Attributes:
        path: The file.
        step: Optimiser steps taken.
        epoch: Epoch.
        metrics: The metrics that ModelCheckpoint monitored, at the time of saving.
        hparams: Hyperparameters of the module, those that are primitives.
        has_data_hparams: Whether it holds those of a datamodule.
        trusted: Whether it may run code when it is loaded.
    """

    path: Path
    step: int
    epoch: int
    metrics: dict[str, float]
    hparams: dict[str, Any]
    has_data_hparams: bool
    trusted: bool


def named(text: str) -> Any:
    """Returns the object ``NAME`` of ``package.module:NAME`` or ``file.py:NAME``.

    Raises:
        ValueError: There is no such thing; says what there is.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"{text!r} is not PKG:NAME, as project.model:Classifier or train.py:Net.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if where.endswith(".py"):
        module = _module_of_file(Path(where))
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if not (where + ".").startswith(str(error.name) + "."):
                raise  # something that it imports is missing
            raise ValueError(
                f"There is no module {where!r} (looked for in the current folder, too). Run this "
                "where `import` finds it, or give a file.py:NAME."
            ) from error
    if not hasattr(module, name):
        own = [
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        ]
        raise ValueError(f"{where} has no {name!r}; it defines {', '.join(own) or 'nothing'}.")
    return getattr(module, name)


def _module_of_file(path: Path) -> Any:
    name = f"_lightning_hessian_{path.resolve().as_posix().replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def find_checkpoints(places: Iterable[Path]) -> list[Path]:
    """Returns the files, and those named ``*.ckpt`` in folders and below, each once.

    Raises:
        FileNotFoundError: There is no such file, or none in a folder.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such checkpoint or folder.")
        inside = sorted(place.rglob("*.ckpt")) if place.is_dir() else [place]
        if not inside:
            raise FileNotFoundError(f"{place} holds no *.ckpt file, nor do folders below it.")
        found += inside
    return list(dict.fromkeys(found))


def read_checkpoint(path: Path, *, trust: bool) -> Saved:
    """Returns what a checkpoint says of itself.

    Raises:
        ValueError: It is none of Lightning's, damaged, or would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if not trust and "weights_only" in str(error).lower():
            raise ValueError(
                f"{path} holds more than tensors and primitives, so loading it could run code "
                f"({_first_line(error)}). If you trust it, give --trust."
            ) from error
        raise ValueError(f"{path} cannot be read ({_first_line(error)}). Save it again.") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}). Save it again.") from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ValueError(
            f"{path} is no checkpoint of Lightning's: it has no state_dict. Save it with "
            "trainer.save_checkpoint."
        )
    return Saved(
        path=path,
        step=int(content.get("global_step", 0)),
        epoch=int(content.get("epoch", 0)),
        metrics=_monitored(content.get("callbacks") or {}),
        hparams=_primitives(content.get("hyper_parameters") or {}),
        has_data_hparams="datamodule_hyper_parameters" in content,
        trusted=trust,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:160]


def _monitored(states: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics in the states of ModelCheckpoint callbacks."""
    found = {}
    for name, state in states.items():
        if not str(name).startswith("ModelCheckpoint") or not isinstance(state, Mapping):
            continue
        monitor, score = state.get("monitor"), state.get("current_score")
        if isinstance(monitor, str) and score is not None:
            found[monitor] = float(score)
    return found


def _primitives(hparams: Mapping[str, Any]) -> dict[str, Any]:
    allowed = (bool, int, float, str, type(None))
    return {str(n): v for n, v in hparams.items() if isinstance(v, allowed)}


def module_of(cls: Any, saved: Saved, options: argparse.Namespace) -> Any:
    """Returns the module with the weights of a checkpoint.

    Raises:
        ValueError: The class is not a LightningModule, or does not fit the checkpoint.
    """
    if not (isinstance(cls, type) and issubclass(cls, MODULES)):
        raise ValueError(f"{options.module} is no LightningModule; give --module PKG:CLASS.")
    known = inspect.signature(cls).parameters  # Lightning passes over what is not among them
    unknown = [name for name in options.module_arg if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(
            f"--module-arg {unknown[0]}: {options.module} takes {', '.join(known) or 'nothing'}."
        )
    try:
        return _load(cls, saved, options.module_arg)
    except TypeError as error:
        raise ValueError(
            f"{options.module} cannot be made from {saved.path} ({_first_line(error)}). Call "
            "save_hyperparameters() in __init__ before training, or give --module-arg NAME=VALUE."
        ) from error
    except RuntimeError as error:
        lines = " ".join(str(error).split())[:300]
        raise ValueError(f"{options.module} does not fit {saved.path}: {lines}") from error


def _load(cls: Any, saved: Saved, arguments: Mapping[str, Any]) -> Any:
    load = cls.load_from_checkpoint
    if "weights_only" in inspect.signature(load).parameters:  # Lightning 2.6
        arguments = {**arguments, "weights_only": not saved.trusted}
    return load(saved.path, map_location="cpu", **arguments)


def data_of(text: str | None, saved: Saved, options: argparse.Namespace) -> Any:
    """Returns a datamodule that is set up, a loader, or batches; None for the module's own.

    Raises:
        ValueError: It cannot be made.
    """
    if text is None:
        return None
    source = named(text)
    try:
        if isinstance(source, type) and issubclass(source, DATA_MODULES):
            data = (
                _load(source, saved, options.data_arg)
                if saved.has_data_hparams
                else source(**options.data_arg)
            )
        elif callable(source):
            data = source(**options.data_arg)
        else:
            data = source
    except TypeError as error:
        raise ValueError(
            f"{text} cannot be made ({_first_line(error)}). Give --data-arg NAME=VALUE."
        ) from error
    if isinstance(data, DATA_MODULES):
        data.prepare_data()
        data.setup("fit")
        return data
    return batches("--data", data)


def batches_of(
    module: Any, data: Any, options: argparse.Namespace, device: torch.device
) -> list[Any]:
    """Returns the probe batches on a device, through the module's transfer hooks.

    Raises:
        ValueError: There is no such loader, or it is empty.
    """
    source = module if data is None else data
    if isinstance(source, (*MODULES, *DATA_MODULES)):
        hook = f"{options.split}_dataloader"
        try:
            loader = getattr(source, hook)()
        except Exception as error:
            if data is not None:
                raise
            raise ValueError(
                f"{options.module} has no {hook} of its own ({_first_line(error)}). Give --data."
            ) from error
        if isinstance(loader, (list, tuple)) and options.split == "val":
            loader = loader[0]  # several: the first, as in the callback
    else:
        loader = source
    if loader is None:
        raise ValueError(f"{options.data or options.module} has no loader for {options.split!r}.")
    drawn = draw_batches(loader, options.num_batches, seed=options.seed)
    with preserved_rng():  # the hooks may augment
        seed_everything(options.seed)
        ready = [module._on_before_batch_transfer(batch, dataloader_idx=0) for batch in drawn]
        return [module._apply_batch_transfer_handler(batch, device=device) for batch in ready]


def validation_metrics(module: Any, data: Any) -> dict[str, float]:
    """Returns what the module logs in a validation.

    Raises:
        ValueError: There is nothing to validate on.
    """
    if data is not None and not isinstance(data, DATA_MODULES):
        raise ValueError("--validate needs a datamodule, or a module with loaders of its own.")
    library = next(each for each in LIBRARIES if isinstance(module, each.LightningModule))
    accelerator = "cpu" if next(module.parameters()).device.type == "cpu" else "auto"
    trainer = library.Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    found = trainer.validate(module, datamodule=data, verbose=False)
    module.trainer = None
    return {name: float(value) for part in found for name, value in part.items()}

"""From names on the command line and a checkpoint to a module and its probe batches."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_hessian.cli.checkpoints import Saved
from lightning_hessian.linear.rng import preserved_rng, seed_everything
from lightning_hessian.probe.arguments import batches
from lightning_hessian.probe.samples import draw_batches
from lightning_hessian.results.outside import reason

LIBRARIES: list[Any] = [L]
"""Lightning under either of its names, where they are installed."""

if importlib.util.find_spec("pytorch_lightning") is not None:
    LIBRARIES.append(importlib.import_module("pytorch_lightning"))

MODULES = tuple(library.LightningModule for library in LIBRARIES)
DATA_MODULES = tuple(library.LightningDataModule for library in LIBRARIES)


def named(text: str) -> Any:
    """Return the object ``NAME`` of ``package.module:NAME`` or ``file.py:NAME``."""
    where, _, name = text.rpartition(":")
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
        except Exception as error:
            raise ValueError(f"{where} cannot be imported: {_told(error)}.") from error
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
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception) or isinstance(error, ModuleNotFoundError):
            raise
        raise ValueError(f"{path} cannot be imported: {_told(error)}.") from error
    return module


def _told(error: BaseException) -> str:
    """Return what an exception of the user's code says, and in which line it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {reason(error)}"


def module_class(options: argparse.Namespace) -> Any:
    """Return the class of the module, its arguments checked."""
    cls = named(options.module)
    if not (isinstance(cls, type) and issubclass(cls, MODULES)):
        raise ValueError(f"{options.module} is no LightningModule; give --module PKG:CLASS.")
    known = inspect.signature(cls).parameters  # Lightning passes over what is not among them
    unknown = [name for name in options.module_arg if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(
            f"--module-arg {unknown[0]}: {options.module} takes {', '.join(known) or 'nothing'}."
        )
    return cls


def module_of(cls: Any, saved: Saved, options: argparse.Namespace) -> Any:
    """Return the module, of the class of `module_class`, with the weights of a checkpoint."""
    try:
        return _load(cls, saved, options.module_arg)
    except TypeError as error:
        raise ValueError(
            f"{options.module} cannot be made from {saved.path} ({reason(error)}). Call "
            "save_hyperparameters() in __init__ before training, or give --module-arg NAME=VALUE."
        ) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        lines = " ".join(str(error).split())[:300]
        raise ValueError(f"{options.module} does not fit {saved.path}: {lines}") from error
    except Exception as error:
        raise ValueError(
            f"{options.module} cannot be made from {saved.path} ({_told(error)}). Give the "
            "checkpoints of this class, or --module-arg NAME=VALUE."
        ) from error


def _load(cls: Any, saved: Saved, arguments: Mapping[str, Any]) -> Any:
    load = cls.load_from_checkpoint
    if "weights_only" in inspect.signature(load).parameters:  # Lightning 2.6
        arguments = {**arguments, "weights_only": not saved.trusted}
    return load(saved.path, map_location="cpu", **arguments)


def data_of(saved: Saved, options: argparse.Namespace) -> Any:
    """Return a datamodule that is set up, a loader, or batches; None for the module's own."""
    text = options.data
    if text is None:
        return None
    source = named(text)
    is_module = isinstance(source, type) and issubclass(source, DATA_MODULES)
    try:
        if is_module and saved.has_data_hparams:
            data = _load(source, saved, options.data_arg)
        else:
            data = source(**options.data_arg) if callable(source) else source
    except TypeError as error:
        raise ValueError(
            f"{text} cannot be made ({reason(error)}). Give --data-arg NAME=VALUE."
        ) from error
    except Exception as error:
        raise ValueError(f"{text} cannot be made ({_told(error)}).") from error
    if isinstance(data, DATA_MODULES):
        try:
            data.prepare_data()
            data.setup("fit")
        except Exception as error:
            raise ValueError(f"{text} cannot be set up ({_told(error)}).") from error
        return data
    return batches("--data", data)


def batches_of(module: Any, data: Any, options: argparse.Namespace) -> list[Any]:
    """Return the probe batches on the device, through the module's transfer hooks."""
    source = module if data is None else data
    if isinstance(source, (*MODULES, *DATA_MODULES)):
        hook = f"{options.split}_dataloader"
        try:
            loader = getattr(source, hook)()
        except Exception as error:
            if data is not None:
                raise
            raise ValueError(
                f"{options.module} has no {hook} of its own ({reason(error)}). Give --data."
            ) from error
        if isinstance(loader, (list, tuple)) and options.split == "val":
            loader = loader[0]  # several: the first, as in the callback
    else:
        loader = source
    if loader is None:
        raise ValueError(f"{options.data or options.module} has no loader for {options.split!r}.")
    drawn = draw_batches(loader, options.num_batches, seed=options.seed)
    ready = []
    with preserved_rng():  # the hooks may augment, and draw what they draw for the callback
        for index, batch in enumerate(drawn):
            seed_everything(options.seed + index)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            ready.append(module._apply_batch_transfer_handler(batch, device=options.device))
    return ready


def validation_metrics(module: Any, data: Any) -> dict[str, float]:
    """Return what the module logs in a validation."""
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

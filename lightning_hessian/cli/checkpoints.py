"""Checkpoints of Lightning: found, opened within bounds, and what they say beside the weights."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_hessian.cli.sharded_checkpoints import LIGHTNINGS_PART, is_sharded, read_weights
from lightning_hessian.results import UnreadableFileError
from lightning_hessian.results.npz import require_stored
from lightning_hessian.results.outside import open_regular, printable, reason, unreadable

_LARGEST = 2**53
"""A step that float64, and so every table and logger, holds exactly."""


@dataclass(frozen=True)
class Saved:
    """What is read of a checkpoint beside its weights."""

    path: Path
    step: int  # of the optimizers
    logged_step: int  # of the row in which the run's loggers have the metrics of these weights
    weights: str  # what tells these weights from others
    epoch: int
    metrics: dict[str, float]  # that ModelCheckpoint monitored, at the time of saving
    hparams: dict[str, Any]  # of the module, those that are primitives
    has_data_hparams: bool  # whether it holds those of a datamodule too
    trusted: bool  # whether it may run code when it is loaded
    problems: tuple[str, ...]  # what of it could not be used, and why


def find_checkpoints(places: Iterable[Path]) -> list[Path]:
    """Return the checkpoints, and those named ``*.ckpt`` in folders and below, each once.

    A checkpoint is a file, or the folder of one that ranks wrote in parts.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place}: no such checkpoint or folder.")
        is_folder = place.is_dir() and not is_sharded(place)
        inside = sorted(place.rglob("*.ckpt")) if is_folder else [place]
        if not inside:
            raise FileNotFoundError(f"{place} holds no *.ckpt file, nor do folders below it.")
        found += inside
    return list(dict.fromkeys(found))


def copy_checkpoint(path: Path, copy: Path, *, trust: bool) -> None:
    """Copy a checkpoint to one file; the parts that ranks wrote are put together.

    Raises:
        UnreadableFileError: The parts of a folder cannot be read; a ValueError.
        OSError: Something cannot be opened or written.
    """
    if is_sharded(path):
        content = dict(_mapping(path, _content(path / LIGHTNINGS_PART, trust)))
        torch.save({**content, "state_dict": read_weights(path)}, copy)
    else:
        with open_regular(path) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 2**22)


def read_checkpoint(path: Path, *, trust: bool) -> Saved:
    """Return what a checkpoint says of itself.

    Raises:
        UnreadableFileError: It is none of Lightning's, damaged, or would run code; a ValueError.
        OSError: It cannot be opened.
    """
    content = _mapping(path, _content(path, trust))
    if not isinstance(content.get("state_dict"), Mapping):
        raise UnreadableFileError(
            f"{path} is no checkpoint of Lightning's: it has no state_dict. Save it with "
            "trainer.save_checkpoint."
        )
    hparams = content.get("hyper_parameters") or {}
    if not isinstance(hparams, Mapping):
        raise UnreadableFileError(
            f"{path}: its hyper_parameters are a {type(hparams).__name__}, not a mapping from "
            "names. Save it again with trainer.save_checkpoint."
        )
    problems: list[str] = []
    step = _count(path, content, "global_step")
    return Saved(
        path=path,
        step=step,
        logged_step=_logged_step(content.get("loops"), step),
        weights=_digest(content["state_dict"]),
        epoch=_count(path, content, "epoch"),
        metrics=_monitored(content.get("callbacks"), problems),
        hparams=_primitives(hparams),
        has_data_hparams="datamodule_hyper_parameters" in content,
        trusted=trust,
        problems=tuple(problems),
    )


def _content(path: Path, trust: bool) -> Any:
    """Return what `torch.load` finds, tensors and primitives only unless it is trusted.

    Without trust the file must be a zip archive, as torch has written them since version 1.6:
    `torch.load` of the older kind allocates what the file claims, and a compressed archive may
    unpack to any size.
    """
    with open_regular(path) as file, unreadable(path, "Save it again."):
        if not trust:
            if not zipfile.is_zipfile(file):
                raise UnreadableFileError(
                    f"{path} is damaged, or no checkpoint as torch 1.6 and later write it. Save "
                    "it again; if it is older and you trust it, give --trust."
                )
            with zipfile.ZipFile(file) as archive:
                require_stored(archive, path)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=not trust)
        except pickle.UnpicklingError as error:
            if trust or "weights_only" not in str(error).lower():
                raise
            raise UnreadableFileError(
                f"{path} holds more than tensors and primitives, so loading it could run code "
                f"({reason(error)}). If you trust it, give --trust."
            ) from error


def _mapping(path: Path, content: Any) -> Mapping[Any, Any]:
    if isinstance(content, Mapping):
        return content
    raise UnreadableFileError(
        f"{path} is no checkpoint of Lightning's: it holds a {type(content).__name__}. "
        "Save it with trainer.save_checkpoint."
    )


def _logged_step(loops: Any, step: int) -> int:
    """Return the step with which Lightning logs the validation of these weights.

    Loggers count batches that stepped, from 0. Lightning adds one after the batch, and takes it off
    again to log what belongs to the end of an epoch. So a checkpoint that is saved at the end of an
    epoch holds one more than the row, and one that is saved within it, or in the validation (before
    Lightning 2.6), the row itself.
    """
    try:
        fit = loops["fit_loop"]
        count = fit["epoch_loop.state_dict"]["_batches_that_stepped"]
        progress = fit["epoch_progress"]["current"]
        found = int(count) - (int(progress["processed"]) >= int(progress["ready"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        found = step - 1  # one optimizer, at the end of an epoch
    return min(max(found, 0), _LARGEST)


def _digest(state: Mapping[Any, Any]) -> str:
    """Return a text that two states share where their tensors are the same bits."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="replace"))
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def _count(path: Path, content: Mapping[str, Any], name: str) -> int:
    """Return a count that a checkpoint holds, 0 where it does not."""
    value = content.get(name, 0)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    if not whole or not 0 <= value <= _LARGEST:
        raise UnreadableFileError(
            f"{path}: its {name} is {printable(repr(value), 60)}, not a whole number from 0 on. "
            "Save it again with trainer.save_checkpoint."
        )
    return int(value)


def _monitored(states: Any, problems: list[str]) -> dict[str, float]:
    """Return the metrics in the states of ModelCheckpoint callbacks."""
    found: dict[str, float] = {}
    for name, state in states.items() if isinstance(states, Mapping) else ():
        if not str(name).startswith("ModelCheckpoint") or not isinstance(state, Mapping):
            continue
        monitor, score = state.get("monitor"), state.get("current_score")
        if not isinstance(monitor, str) or score is None:
            continue
        try:
            found[printable(monitor)] = float(score)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            problems.append(f"its {printable(monitor, 100)} is no number ({reason(error)})")
    return found


def _primitives(hparams: Mapping[Any, Any]) -> dict[str, Any]:
    allowed = (bool, int, float, str, type(None))
    return {str(n): v for n, v in hparams.items() if isinstance(v, allowed)}

"""The rules of arguments on the command line: a text becomes a value, or one line says why not."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import Rule, nonempty_text
from lightning_hessian.results.outside import reason
from lightning_hessian.results.path_arguments import path_name


def read_as(convert: Callable[[str], Any], rule: Rule) -> Callable[[str], Any]:
    """Return a ``type=`` for argparse: the text converted, then checked by the rule.

    What ``convert`` (``int``, ``float``, ...) cannot convert goes to the rule as it is.
    """

    def read(text: str) -> Any:
        value: Any = text
        with contextlib.suppress(ValueError, OverflowError):  # the rule refuses the text
            value = convert(text)
        try:
            return rule("", value)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be used. {error.remedy}") from None

    return read


a_text = read_as(str, nonempty_text)
"""A text that is not empty."""


def package_name(text: str) -> str:
    """Return ``PKG:NAME`` or ``file.py:NAME`` as it is."""
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PKG:NAME, as project.model:Classifier or train.py:Net."
        )
    return text


a_path = read_as(str, lambda name, value: Path(path_name(name, value)))
"""A path; an empty text is none."""


def a_device(text: str) -> Any:
    """Return a torch device by name, once something has been computed on it."""
    import torch

    try:
        device = torch.device(text)
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # noqa: BLE001 - it depends on how torch was built
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used ({reason(error)[:100].rstrip('.')}). Give a device that "
            "torch finds here, such as cpu."
        ) from None
    return device


def entity_and_project(text: str) -> str:
    """Return ``ENTITY/PROJECT`` as it is."""
    entity, slash, project = text.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ENTITY/PROJECT; write my-team/my-project."
        )
    return text


def named_values(texts: list[str], refusal: str) -> dict[str, Any]:
    """Return what ``NAME=VALUE`` says in each text, values as JSON has them, else as text.

    ``refusal`` is said of a text that is nothing of the kind, with ``{!r}`` in its place.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(refusal.format(text))
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found

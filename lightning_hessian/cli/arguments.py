"""The rules of arguments on the command line: a text becomes a value, or one line says why not."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import Rule, nonempty_text
from lightning_hessian.results.path_arguments import path_name


def read_as(convert: Callable[[str], Any], rule: Rule) -> Callable[[str], Any]:
    """Return a ``type=`` for argparse: the text converted, then checked by the rule.

    Args:
        convert: ``int``, ``float``, ...; what it cannot convert goes to the rule as it is.
        rule: As in `results.arguments`.
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


def a_device(text: str) -> str:
    """Return a torch device by name, once it has been seen to work."""
    import torch

    try:
        if torch.device(text).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100].rstrip(".")
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used ({reason}). Give a device that torch finds here, such as cpu."
        ) from None
    return text


def entity_and_project(text: str) -> str:
    """Return ``ENTITY/PROJECT`` as it is."""
    entity, slash, project = text.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ENTITY/PROJECT; write my-team/my-project."
        )
    return text

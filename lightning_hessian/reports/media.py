"""The figures of an offline run, as data that a page holds; never a file from anywhere else.

A run names its figures by paths, and a run may come from anybody: a path may point out of its
folder, through ``..`` or a link, at a device, or at something that is no picture.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Pictures = list[dict[str, str]]
"""Each with its ``name``, and its ``data`` as an address."""

_PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 4 * 2**20
"""Of one figure; ours have below 0.2 MiB, and a page holds all of them."""

MOST_FIGURES = 40
"""On one page; a run with every statistic and layer has about fifteen."""


def figures_of(rows: Sequence[Mapping[str, Any]], media: Path | None) -> tuple[Pictures, list[str]]:
    """Return the last figure of each kind, and a sentence for each that was left out."""
    paths: dict[str, str] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("figures/") and key.endswith(".path") and isinstance(value, str):
                paths[key.removeprefix("figures/").removesuffix(".path")] = value
    return _shown(paths, media)


def figures_beside(folder: Path) -> tuple[Pictures, list[str]]:
    """Return the last figure of each kind in ``<folder>/figures``, where files stand in."""
    paths: dict[str, str] = {}
    place = folder / "figures"
    for file in sorted(place.glob("*_step_*.png")) if place.is_dir() else ():
        paths[file.stem.rpartition("_step_")[0]] = file.name
    return _shown(paths, place)


def shown_figures(contents: Mapping[str, bytes]) -> tuple[Pictures, list[str]]:
    """Return PNG files by name as a page holds them, and a sentence for each left out."""
    found, left_out = [], []
    for name, content in list(contents.items())[:MOST_FIGURES]:
        try:
            found.append(_picture(name, _checked(content)))
        except ValueError as error:
            left_out.append(f"the figure {name!r} is left out: {error}")
    return found, left_out


def _shown(paths: Mapping[str, str], media: Path | None) -> tuple[Pictures, list[str]]:
    """Return figures by their paths in a folder."""
    found, left_out = [], []
    if len(paths) > MOST_FIGURES:
        left_out.append(f"{len(paths) - MOST_FIGURES} figures are left out of {len(paths)}")
    for name, path in list(paths.items())[:MOST_FIGURES]:
        try:
            content = None if media is None else read_png(media, path)
        except (OSError, ValueError) as error:
            left_out.append(f"the figure {name!r} is left out: {_why(error)}")
            continue
        if content is not None:
            found.append(_picture(name, content))
    return found, left_out


def _picture(name: str, content: bytes) -> dict[str, str]:
    data = base64.b64encode(content).decode("ascii")
    return {"name": name.replace("_", " "), "data": f"data:image/png;base64,{data}"}


def read_png(folder: Path, path: str) -> bytes | None:
    """Return a PNG file in a folder; None where the folder has no such file (not written yet).

    Args:
        folder: The only folder that files may come from.
        path: Relative to it, as the run names it.

    Raises:
        ValueError: It lies outside, by whatever way; it is no regular file, no PNG, or too large.
        OSError: It cannot be read.
    """
    home = folder.parent.resolve() / folder.name
    if home.is_symlink():
        raise ValueError("the run's folder of files is a link")
    real = Path(os.path.realpath(home / path))
    if not real.is_relative_to(home) or real == home:
        raise ValueError("it does not lie in the run's folder of files")
    if not os.path.lexists(real):
        return None
    # Opening a pipe would wait for a writer; the file that is open is the one that is checked.
    handle = os.open(
        real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    )
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(MOST_BYTES + 1)
    return _checked(content)


def _checked(content: bytes) -> bytes:
    """Return what is a PNG file of moderate size."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    if not content.startswith(_PNG):
        raise ValueError("it is no PNG")
    return content


def _why(error: Exception) -> str:
    """Return the cause without a path: what lies outside is not even named."""
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)

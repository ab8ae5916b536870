"""The documentation site: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import tomllib
from docutils import nodes
from docutils.parsers.rst import Directive

import lightning_hessian
from lightning_hessian.cli.main import main

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "lightning_hessian"
author = "The lightning_hessian authors"
copyright = "the lightning_hessian authors, Apache-2.0"
version = release = lightning_hessian.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False
suppress_warnings = ["myst.strikethrough"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say types, shapes and units in words
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "furo"
html_title = "lightning_hessian"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

_ELSEWHERE = re.compile(r"\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_PAGES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md"}


def link_to_repository(app: Any, name: str, source: list[str]) -> None:
    """Turn links to files outside this folder, which serve readers of the checkout, into others.

    What has a page here leads there; the rest leads to the repository.
    """
    up = "../" * name.count("/")

    def replaced(found: re.Match[str]) -> str:
        target = (HERE / name).parent.joinpath("..", found["path"]).resolve()
        if not target.exists():
            raise ValueError(f"docs/{name}: a link leads to {target}, which is not there.")
        if target.is_relative_to(HERE):
            return found[0]
        path, anchor = target.relative_to(HERE.parent).as_posix(), found["anchor"] or ""
        if path in _PAGES:
            return f"]({up}{_PAGES[path]}{anchor})"
        return f"]({REPOSITORY}/blob/main/{path}{anchor})"

    source[0] = _ELSEWHERE.sub(replaced, source[0])


def plain_code(app: Any, what: str, name: str, given: Any, options: Any, lines: list[str]) -> None:
    """Turn single backticks in docstrings into links to public names, and the rest into code."""

    def replaced(found: re.Match[str]) -> str:
        word = found[1]
        public = word in lightning_hessian.__all__
        return f":py:obj:`~lightning_hessian.{word}`" if public else f"``{word}``"

    lines[:] = [re.sub(r"(?<![`:\w])`([^`\n]+)`(?![`_\w])", replaced, line) for line in lines]


class CommandLine(Directive):
    """What ``lightning-hessian COMMAND --help`` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return it as a block of text."""
        text = io.StringIO()
        os.environ["COLUMNS"] = "90"
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([self.arguments[0], "--help"])
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="text")]


def setup(app: Any) -> None:
    """Register all of them."""
    app.add_directive("command-line", CommandLine)
    app.connect("source-read", link_to_repository)
    app.connect("autodoc-process-docstring", plain_code, priority=900)

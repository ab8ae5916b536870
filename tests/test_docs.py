"""The pages: every public name has an entry and an example, and what they show can be run."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

import lightning_hessian

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
TOPLEVEL = set(lightning_hessian.__all__)


def blocks(page: Path) -> list[str]:
    """Return the Python code of a page."""
    found = BLOCK.findall(page.read_text())
    return ["\n".join(line[len(indent) :] for line in code.split("\n")) for indent, code in found]


def test_every_public_name_has_an_entry():
    entries = set()
    for page in (DOCS / "api").glob("*.md"):
        entries |= set(re.findall(r"auto\w+:: lightning_hessian\.(\w+)$", page.read_text(), re.M))
    assert entries == TOPLEVEL


RECORDS = {"BlockStructure", "Eigengaps", "GradientStructure", "HessianSpectrum", "PowerLawFit"}
"""Made by the functions, whose examples show them."""


def test_every_public_name_has_an_example():
    """Doctests of the package run it."""
    without = {name for name in TOPLEVEL if ">>> " not in getattr(lightning_hessian, name).__doc__}
    assert without <= RECORDS


def test_every_entry_leads_to_something():
    for page in (DOCS / "api").glob("*.md"):
        for path in re.findall(r"auto\w+:: ([\w.]+)$", page.read_text(), re.M):
            module, _, name = path.rpartition(".")
            found = getattr(__import__(module, fromlist=[name]), name)
            assert found.__doc__, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_on_the_pages_names_what_is_there(page):
    for code in blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_hessian"):
                for alias in node.names:
                    module = __import__(node.module, fromlist=[alias.name])
                    assert hasattr(module, alias.name), (page.name, node.module, alias.name)


def test_every_page_is_on_the_site():
    listed = set()
    for tree in re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL):
        listed |= {line.strip() for line in tree.splitlines() if line and not line.startswith(":")}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert pages - listed <= {"index"}


def test_the_first_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / "start.md")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "start.md", "exec"), {"__name__": "start"})
    last = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1].replace("nan", "0"))
    assert last["num_converged"] == 20

"""The notebooks run: their code as it stands, and, where Jupyter is, in a real kernel."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_hessian

ROOT = Path(lightning_hessian.__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

RUNNER = """
import ast, json, sys
import matplotlib
matplotlib.use("agg")
shown = []
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] != "code":
        continue
    source = "".join(cell["source"])
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
        if value is not None and not source.rstrip().endswith(";"):
            made = getattr(value, "_repr_html_", None)
            html = "" if made is None else made()
            shown.append([type(value).__name__, "<img" in html, len(html), len(repr(value))])
print(json.dumps(shown))
"""
SHOWN = {
    "spectrum": ["HessianSpectrum", "BlockStructure", "GradientStructure"],
    "run": ["RunTable", "CorrelationReport"],
}


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_there_are_two_and_they_are_clean() -> None:
    """They are kept without outputs, which would change at every run."""
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == []
                assert cell["execution_count"] is None
                ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_records_show_themselves(path: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, str(path)],
        cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    shown = json.loads(run.stdout.splitlines()[-1])
    pictured = [kind for kind, picture, _, _ in shown if picture]
    assert pictured == SHOWN[path.stem]
    assert all(length < 100_000 and words < 2_000 for _, _, length, words in shown)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(path: Path, tmp_path: Path) -> None:
    """`make test-notebooks` installs Jupyter for it."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    )
    client.execute(env=_environment())
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error"]
    data = [one.data for one in outputs if "data" in one]
    pictured = [one for one in data if "data:image/png;base64" in one.get("text/html", "")]
    assert len(pictured) == len(SHOWN[path.stem])
    assert any("image/png" in one for one in data), "plot() shows no figure at the end of a cell"


BAR = """
import lightning as L, time, torch
from lightning_hessian.tracking import progress
progress._PATIENCE = 0.0

bar = L.pytorch.callbacks.TQDMProgressBar()
shown = progress.Progress(bar, "spectrum", expected=20)
shown._shown_at = 0
states = []
for done in (5, 10, 30):
    shown._shown_at = 0
    shown(done)
    widget = shown._bar._bar.container.children[-2]
    states.append((widget.value, widget.max, widget.bar_style))
container = shown._bar._bar.container
shown.close()
print(states, container.layout.visibility, widget.bar_style)
"""


@pytest.mark.slow
def test_the_bar_of_a_measurement_in_a_kernel(tmp_path: Path) -> None:
    """It fills as the measurement goes on, and goes at its end; it neither stays nor turns red."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipywidgets")
    import nbformat.v4 as nb

    notebook = nb.new_notebook(cells=[nb.new_code_cell(BAR)])
    nbclient.NotebookClient(notebook, timeout=120).execute(env=_environment())
    (cell,) = notebook.cells
    text = "".join(one.text for one in cell.outputs if one.output_type == "stream")
    assert "[(5.0, 20.0, ''), (10.0, 20.0, ''), (30.0, 33.0, '')] hidden" in text
    assert text.strip().endswith("hidden")

"""What is published: links, metadata, and a wheel that runs with what it declares and no more."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_hessian

ROOT = Path(lightning_hessian.__file__).parents[1]
tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_links_of_the_readme_lead_to_files_that_are_there() -> None:
    for link in LINK.findall((ROOT / "README.md").read_text()):
        path, _, anchor = link.partition("#")
        if ":" in link:
            continue
        assert (ROOT / path).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_repository_is_named_in_one_place() -> None:
    """Everything else reads pyproject.toml, so that a placeholder is replaced once."""
    files = subprocess.run(
        ["git", "grep", "-l", REPOSITORY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if files.returncode > 1:
        pytest.skip("no checkout")
    assert set(files.stdout.split()) <= {"pyproject.toml"}


def test_the_version_has_a_changelog() -> None:
    version = lightning_hessian.__version__
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build the sdist, and the wheel from what the sdist holds, as pip would."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    make = [sys.executable, "-m", "hatchling", "build", "-d", str(out), "-t"]
    subprocess.run([*make, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (folder,) = (out / "unpacked").iterdir()
    subprocess.run([*make, "wheel"], cwd=folder, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "unpacked": folder}


@pytest.mark.slow
def test_metadata_are_complete(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        found = Parser().parsestr(wheel.read(name).decode())
        names = wheel.namelist()
    assert found["Version"] == lightning_hessian.__version__
    assert found["Description-Content-Type"] == "text/markdown"
    assert len(found.get_all("Project-URL")) == len(PROJECT["urls"])
    text = found.get_payload()
    links = LINK.findall(text)
    assert links
    assert not [link for link in links if ":" not in link and not link.startswith("#")]
    tag = f"v{lightning_hessian.__version__}"
    assert f"{REPOSITORY}/raw/{tag}/docs/spectrum.png" in text
    needed = {Requirement(text).name for text in found.get_all("Requires-Dist")}
    assert {"torch", "numpy", "matplotlib"} <= needed
    assert "lightning_hessian/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    (unpacked,) = [built["unpacked"]]
    for part in ("docs/index.md", "tests/test_packaging.py", "hatch_build.py", "CHANGELOG.md"):
        assert (unpacked / part).exists()


@pytest.mark.slow
def test_twine_has_nothing_to_say(built: dict[str, Path]) -> None:
    pytest.importorskip("twine")
    files = [str(built["sdist"]), str(built["wheel"])]
    run = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("PASSED") == 2


def _declared(requirements: list[str], seen: set[str]) -> set[str]:
    """Return the distributions that requirements bring, by their normal names."""
    for text in requirements:
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in requirement.extras or ()] or [{"extra": ""}]
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        marker = requirement.marker
        if name in seen or (marker and not any(marker.evaluate(one) for one in environments)):
            continue
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        seen.add(name)
        _declared(further, seen)
        for extra in requirement.extras:
            chosen = [one for one in further if f'"{extra}"' in one or f"'{extra}'" in one]
            _declared([one.partition(";")[0] for one in chosen], seen)
    return seen


@pytest.fixture(scope="module")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment of the wheel and links to what it declares, and nothing else.

    The links stand for a download of gigabytes. What is not declared cannot be imported.
    """
    root = tmp_path_factory.mktemp("empty")
    venv.create(root, with_pip=False, symlinks=True)
    (site,) = root.glob("lib/python*/site-packages")
    for name in _declared(PROJECT["dependencies"], set()):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(source)
    install = [sys.executable, "-m", "pip", "--python", str(root / "bin/python"), "install"]
    subprocess.run(
        [*install, "--no-deps", "--no-index", str(built["wheel"])], check=True, capture_output=True
    )
    return root / "bin"


def _run(environment: Path, *command: str, cwd: Path) -> str:
    """Run a program of the environment, far from the checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    run = subprocess.run(
        [str(environment / command[0]), *command[1:]],
        cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning_hessian
from lightning_hessian import HessianSpectrumCallback, correlation_report, load_runs, write_report
assert "site-packages" in lightning_hessian.__file__, lightning_hessian.__file__
loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.randn(32, 1)), batch_size=8)
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])
    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)
callback = HessianSpectrumCallback(num_eigenvalues=3, time_budget=None, num_batches=2)
logger = L.pytorch.loggers.CSVLogger("logs")
trainer = L.Trainer(max_epochs=6, callbacks=[callback], logger=logger, accelerator="cpu",
                    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Net(), loader, loader)
report = correlation_report(load_runs("logs"))
print(write_report(report, "report").name, len(callback.history), "<img" in report._repr_html_())
"""


@pytest.mark.slow
def test_the_wheel_runs_with_what_it_declares(environment: Path, tmp_path: Path) -> None:
    assert "measure" in _run(environment, "lightning-hessian", "--help", cwd=tmp_path)
    (tmp_path / "fit.py").write_text(SCRIPT)
    said = _run(environment, "python", "fit.py", cwd=tmp_path).splitlines()[-1]
    assert said == "report.html 6 True"


@pytest.mark.slow
def test_what_is_not_declared_is_not_there(environment: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    for name in ("pytest", "hypothesis", "twine"):
        said = _run(
            environment, "python", "-c",
            f"import importlib.util; print(importlib.util.find_spec({name!r}))", cwd=tmp_path,
        )  # fmt: skip
        assert said.strip() == "None", name

"""The dashboard: its specification, and what the real client sends of it to a server of our own."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from callbacks.tiny_modules import Regression
from support.runs import finished, measuring, train, wandb_logger
from torch import Tensor, nn

from lightning_hessian import GradientStructureCallback
from lightning_hessian.cli.main import main
from lightning_hessian.measure.budget import Budget
from lightning_hessian.tracking.dashboard import (
    Figures,
    Lines,
    build_workspace,
    sections,
    workspace_json,
)
from lightning_hessian.tracking.history import correlation_scalars

pytest.importorskip("wandb_workspaces")

GOLDEN = Path(__file__).with_name("workspace_golden.json")
SECTIONS = [
    "Generalization", "Sharpness", "Stability", "Spectrum", "Layers", "Blocks", "Gradients", "Cost",
]  # fmt: skip
KEY = "0123456789abcdef" * 2 + "01234567"


def without_ids(spec: Any) -> Any:
    """A specification without what the client draws at random."""
    if isinstance(spec, dict):
        return {key: without_ids(value) for key, value in spec.items() if key != "__id__"}
    if isinstance(spec, list):
        return [without_ids(value) for value in spec]
    return spec


def panels_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = spec["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def test_the_specification_is_the_golden_one() -> None:
    """After a change that was meant: python tests/tracking/test_dashboard.py writes it anew."""
    spec = without_ids(workspace_json(build_workspace("team", "digits")))
    assert spec == json.loads(GOLDEN.read_text())


def test_sections_and_metrics() -> None:
    panels = panels_of(
        workspace_json(build_workspace("team", "digits", monitor=["val/loss", "acc"]))
    )
    assert list(panels) == SECTIONS
    titles = [panel["config"].get("chartTitle", "") for panel in panels["Generalization"]]
    assert sum("val/loss" in title for title in titles) == sum("acc" in title for title in titles)
    drawn = {key for panel in panels["Spectrum"] for key in panel["config"].get("metrics", [])}
    assert {"hessian/d_ks", "hessian/d_c", "hessian/s_hat"} <= drawn
    in_a_run = [panel for panel in panels["Generalization"]
                if panel["config"].get("xAxis") == "hessian/d_ks"]  # fmt: skip
    assert [panel["config"]["metrics"] for panel in in_a_run] == [["val/loss"], ["acc"]]
    across = [panel["config"] for panel in panels["Generalization"]
              if panel["viewType"] == "Scatter Plot"]  # fmt: skip
    assert across[0]["xAxis"] == "summary:hessian/d_ks"
    assert across[0]["yAxis"] == "summary:val/loss"


class Classes(Regression):
    """Tells two classes apart, so that there are blocks of neurons and of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(self.net[-1].in_features, 2)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), (targets.flatten() > 0).long())


@pytest.mark.usefixtures("own_wandb")
def test_every_key_of_the_dashboard_is_logged(tmp_path: Path) -> None:
    gradients = GradientStructureCallback(
        num_gradients=40,
        num_eigenvalues=10,
        time_budget=Budget(seconds=600),
        figures=2,
        on_error="raise",
    )
    logger = wandb_logger(tmp_path)
    layers = {"first": "net.0.*", "head": "net.2.*", "weights": "*weight"}
    train(tmp_path, [measuring(layers=layers), gradients], logger)
    run = finished(logger, tmp_path)
    logged = {re.sub(r"\.path$", "", key) for row in run.rows for key in row}
    # Neurons have ratios that layers have not, and the turn of ten vectors a bound by the next.
    by_neuron = measuring(blocks="neuron", figures=None, num_eigenvalues=14)
    train(tmp_path / "neurons", [by_neuron], False, module=Classes())
    logged |= {key if "/" in key else f"hessian/{key}" for key in by_neuron.history[-1]}
    # Far from the targets the mean gradient is told from zero in every measurement.
    early = GradientStructureCallback(num_gradients=32, batch_size=1, figures=None, tests=False)
    far = Regression(lr=1e-4)
    nn.init.constant_(far.net[-1].bias, 5.0)
    train(tmp_path / "early", [early], False, module=far)
    logged |= correlation_scalars(early.correlations(), "gradient_").keys()
    logged |= {key if "/" in key else f"gradient/{key}" for key in early.history[-1]}
    for heading, panels in sections().items():
        for panel in panels:
            if isinstance(panel, (Lines, Figures)):
                missing = set(panel.keys) - logged
                if isinstance(panel, Lines) and panel.pattern:
                    found = [key for key in logged if re.fullmatch(panel.pattern, key)]
                    start = panel.pattern.removesuffix(".*")
                    missing |= layers.keys() - {key.removeprefix(start) for key in found}
                assert not missing, f"{heading}, {panel.title}: {missing}"


# The real client against a server of our own --------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers what the client asks before and at saving a view, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuse = False
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = json.loads(body)
        request |= {"path": self.path, "authorization": self.headers.get("Authorization")}
        self.server.asked.append(request)
        answer: dict[str, Any] = {"data": self._data(request)}
        if self.server.refuse and "upsertView" in request["query"]:
            answer = {"data": None, "errors": [{"message": "permission denied"}]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _data(self, request: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in request["query"]:
            view = {"id": "Vmlldzox", "name": request["variables"]["name"]}
            return {"upsertView": {"view": view, "inserted": True}}
        viewer = {
            "id": "VXNlcjox", "entity": "team", "username": "someone", "name": "someone",
            "email": "someone@example.org", "flags": "{}", "admin": False, "deletedAt": None,
            "apiKeys": {"edges": []}, "teams": {"edges": []},
        }  # fmt: skip
        return {"viewer": viewer, "serverInfo": {"featuresJSONString": "{}"}}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def save(home: Path, url: str, key: str | None, *arguments: str) -> Any:
    """Runs the command in a process that knows of no other server and no other key."""
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("WANDB")}
    environment |= {"WANDB_BASE_URL": url, "HOME": str(home), "WANDB_ERROR_REPORTING": "false",
                    "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # fmt: skip
    if key is not None:
        environment["WANDB_API_KEY"] = key
    return subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "lightning_hessian.cli.main", "workspace",
            *arguments,
        ],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=120, check=False,
    )  # fmt: skip


def test_what_the_client_sends(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    run = save(tmp_path, url, KEY, "team/digits", "--name", "Curvature")
    assert run.returncode == 0, run.stderr
    assert {request["path"] for request in server.asked} == {"/graphql"}
    expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert {request["authorization"] for request in server.asked} == {expected}
    kinds = [re.search(r"(query|mutation) (\w+)", request["query"]) for request in server.asked]
    named = [kind.groups() for kind in kinds if kind]
    assert named[0] == ("query", "Viewer")
    assert named.count(("mutation", "UpsertView2")) == 1
    assert set(named) == {("query", "Viewer"), ("mutation", "UpsertView2")}
    (request,) = [request for request in server.asked if "upsertView" in request["query"]]
    variables = copy.deepcopy(request["variables"])
    spec = json.loads(variables.pop("spec"))
    name = variables.pop("name")
    assert re.fullmatch(r"nw-\w{11}-v", name)
    assert variables == {
        "entityName": "team",
        "projectName": "digits",
        "displayName": "Curvature",
        "type": "project-view",
        "description": "",
        "locked": False,
    }
    assert without_ids(spec) == json.loads(GOLDEN.read_text())
    identity = name.removeprefix("nw-").removesuffix("-v")
    assert run.stdout == f"View: {url}/team/digits?nw={identity}\n"


def test_a_refused_view_ends_in_one_line(server: Server, tmp_path: Path) -> None:
    server.refuse = True
    run = save(tmp_path, f"http://127.0.0.1:{server.server_address[1]}", KEY, "team/digits")
    assert run.returncode == 2
    assert "permission denied" in run.stderr
    assert "--spec FILE" in run.stderr
    assert "Traceback" not in run.stderr


def test_no_key_ends_in_one_line(tmp_path: Path) -> None:
    run = save(tmp_path, "http://127.0.0.1:9", None, "team/digits")
    assert run.returncode == 2
    assert "wandb login" in run.stderr
    assert "Traceback" not in run.stderr


def test_without_a_server_the_view_is_written_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "view.json"
    assert main(["workspace", "team/digits", "--spec", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    assert without_ids(json.loads(file.read_text())) == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("path", ["digits", "team/", "/digits", "team/digits/run"])
def test_a_wrong_path_says_what_is_wanted(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspace", path]) == 2
    assert "is not ENTITY/PROJECT" in capsys.readouterr().err


if __name__ == "__main__":
    text = json.dumps(without_ids(workspace_json(build_workspace("team", "digits"))), indent=1)
    GOLDEN.write_text(text + "\n")

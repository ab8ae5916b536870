"""The live page: what it says of real offline runs, while they go on and after."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from scipy import stats
from support.browser import CHROMIUM, drawn
from support.pages import data_of
from support.runs import finished, measuring, train, wandb_logger

from lightning_hessian import correlation_report, load_runs
from lightning_hessian.histories.offline_run import OfflineRun, read_offline_run
from lightning_hessian.reports.live import cards, follow, live_page, measurements
from lightning_hessian.reports.live_charts import panels
from lightning_hessian.reports.live_runs import offline_run
from lightning_hessian.reports.verdicts import judged


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, OfflineRun]]:
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
            monkeypatch.setenv(f"WANDB_{name}", str(folder / "home"))
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        wandb.teardown()  # it reads these once in a process, and tests before may have used it
        callback, logger = measuring(figures=100), wandb_logger(folder)
        train(folder, [callback], logger)
        yield folder, callback, finished(logger, folder)


def test_the_page_holds_the_numbers_of_the_run(trained: Any, tmp_path: Path) -> None:
    folder, callback, run = trained
    page = follow(folder, tmp_path, monitor=["val_loss"], interval=60)
    assert page == tmp_path / "live.html"
    data = data_of(page.read_text())
    history = callback.history
    assert (data["status"], data["refresh"], data["measurements"]) == ("finished", None, 6)
    charts = {c["title"]: c for part in data["sections"] for c in part["charts"]}
    (line,) = charts["Largest eigenvalue"]["series"]
    expected = [[row["step"], row["lambda_1"]] for row in history]
    np.testing.assert_allclose(line["points"], expected, rtol=1e-6)
    (scatter,) = charts["val_loss over d_ks, in a run"]["series"]
    np.testing.assert_allclose(
        scatter["points"], [[row["d_ks"], row["val_loss"]] for row in history], rtol=1e-6
    )
    for found in data["correlations"]:
        x, y = ([row[key] for row in history] for key in (found["statistic"], "val_loss"))
        expected = stats.pearsonr(x, y)
        assert found["r"] == pytest.approx(expected[0], abs=1e-5)
        low, high = expected.confidence_interval()
        assert (found["fisher_low"], found["fisher_high"]) == pytest.approx((low, high), abs=1e-4)
        assert (found["num_points"], found["monitor"]) == (6, "val_loss")
    assert [spectrum["step"] for spectrum in data["spectra"]] == [1, 3, 5, 7, 9, 11]
    np.testing.assert_allclose(
        data["spectra"][-1]["values"], callback.last_spectrum.leading, rtol=1e-3
    )
    assert {figure["name"] for figure in data["figures"]} >= {
        "hessian rank",
        "hessian scatter val loss",
    }
    assert data["latest"]["d_ks"] == pytest.approx(history[-1]["d_ks"], rel=1e-6)
    assert measurements(offline_run(run).record)[2]["s_hat"] == pytest.approx(
        history[2]["s_hat"], rel=1e-6
    )


def test_the_cards_say_no_more_than_the_numbers(trained: Any) -> None:
    _, callback, run = trained
    straight, sharp, stable, goes = data_of(live_page(offline_run(run), ["val_loss"]))["cards"]
    first, last = callback.history[0], callback.history[-1]
    assert f"{first['d_ks']:.4g} → {last['d_ks']:.4g}" in straight["numbers"]
    assert ("straighter" in straight["says"].split()) == (last["d_ks"] < first["d_ks"]) or (
        "less straight" in straight["says"]
    )
    assert ("; below d_c" in straight["says"]) == (last["d_ks"] < last["d_c"])
    assert f"{last['lambda_1'] / first['lambda_1']:.3g} times" in sharp["says"]
    assert f"→ {last['stability/ratio']:.4g}" in stable["numbers"]
    assert ("below 1" in stable["says"]) == (last["stability/ratio"] <= 1)
    (folder,) = trained[0].glob("wandb/offline-run-*")
    report = correlation_report(load_runs(folder, cache=False), monitor="val_loss", workers=1)
    best = max(report.within, key=lambda pair: abs(pair.r))  # six points show nothing of any
    name = best.statistic.removeprefix("hessian/")
    low, high = best.fisher
    assert goes["numbers"] == f"{name}: r = {best.r:.2f} [{low:.2f}, {high:.2f}], n = 6"
    assert goes["says"] == judged(best).sentence


class Tags(html.parser.HTMLParser):
    """Collects what a page asks of others."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [v or "" for name, v in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_needs_no_network(trained: Any) -> None:
    page = live_page(offline_run(trained[2]), ["val_loss"])
    tags = Tags()
    tags.feed(page)
    assert tags.asked == []
    code = page.replace(json.dumps(data_of(page)), "")
    assert not re.findall(r"(?:fetch|import|XMLHttpRequest)\s*\(|@import|url\(", code)
    assert set(re.findall(r"https?://[^\s\"']+", code)) <= {"http://www.w3.org/2000/svg"}


def test_a_name_cannot_end_the_script(trained: Any) -> None:
    name = "</script><script>alert(1)</script>"
    run = dataclasses.replace(trained[2], name=name)
    page = live_page(offline_run(run), ["val_loss"])
    assert page.count("</script>") == 1
    assert data_of(page)["name"] == name


def test_a_monitor_that_is_not_logged_is_told_with_near_ones(trained: Any) -> None:
    data = data_of(live_page(offline_run(trained[2]), ["val_los"]))
    (note,) = data["notes"]
    assert "val_los is not logged; there are val_loss" in note
    assert data["cards"][-1]["numbers"] == "not known yet"


def test_a_run_without_measurements_has_a_page(trained: Any) -> None:
    empty = dataclasses.replace(trained[2], rows=[], exit_code=None)
    data = data_of(live_page(offline_run(empty), ["val_loss"], refresh=5))
    assert (data["status"], data["measurements"], data["sections"]) == (
        "running, or cut off",
        0,
        [],
    )
    assert data["refresh"] == 5


def test_repeated_steps_and_layers(trained: Any) -> None:
    rows = [
        {"trainer/global_step": 4, "hessian/d_ks": 9.0, "val_loss": 1.0},
        {"trainer/global_step": 4, "hessian/d_ks": 0.5, "val_loss": 2.0},
        {
            "trainer/global_step": 8,
            "hessian/d_ks": float("nan"),
            "layers/d_ks_head": 0.25,
            "layers/d_ks_layers_07": 0.5,
            "layers/s_hat_head": 2.0,
        },
    ]
    run = dataclasses.replace(trained[2], rows=rows)
    first = measurements(offline_run(run).record)[0]
    assert (first["step"], first["d_ks"]) == (4.0, 0.5)
    data = data_of(live_page(offline_run(run), ["val_loss"]))
    (layer,) = [part for part in data["sections"] if part["name"] == "Layers"]
    charts = {
        chart["title"]: [(one["key"], one["points"]) for one in chart["series"]]
        for chart in layer["charts"]
    }
    assert charts == {
        "Slope of each layer": [("head", [[8.0, 2.0]])],
        "KS distance of each layer": [("head", [[8.0, 0.25]]), ("layers_07", [[8.0, 0.5]])],
    }


def test_a_damaged_spectrum_is_named_and_the_rest_shown(trained: Any) -> None:
    rows = [*trained[2].rows, {"trainer/global_step": 99, "spectra/hessian": "TEg="}]
    data = data_of(live_page(offline_run(dataclasses.replace(trained[2], rows=rows)), ["val_loss"]))
    assert "the spectra cannot be shown" in data["notes"][0]
    assert data["correlations"]


def test_it_follows_a_run_to_its_end(trained: Any, tmp_path: Path) -> None:
    """The file grows under the reader, as wandb writes it: by pieces that end anywhere."""
    (source,) = trained[0].glob("wandb/offline-run-*/*.wandb")
    whole = source.read_bytes()
    target = tmp_path / "offline-run-1-x" / source.name
    target.parent.mkdir()
    target.touch()  # the run has just begun
    out = tmp_path / "page.html"
    following = threading.Thread(
        target=follow, args=(tmp_path, out), kwargs={"monitor": ["val_loss"], "interval": 0.05}
    )
    following.start()
    seen = []
    for cut in (len(whole) // 3, len(whole) // 2, len(whole) - 3):
        with target.open("ab") as file:
            file.write(whole[target.stat().st_size : cut])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if out.exists() and out.stat().st_mtime_ns > target.stat().st_mtime_ns:
                break
        data = data_of(out.read_text())
        assert data["refresh"] == 0.05
        seen.append(data["measurements"])
        assert following.is_alive()
    with target.open("ab") as file:
        file.write(whole[target.stat().st_size :])
    following.join(timeout=30)
    assert not following.is_alive()
    data = data_of(out.read_text())
    assert (data["status"], data["refresh"], data["measurements"]) == ("finished", None, 6)
    assert seen == sorted(seen)
    assert not list(tmp_path.glob("*.part"))


def test_once_and_errors(trained: Any, tmp_path: Path) -> None:
    page = follow(trained[0], tmp_path / "new" / "page.html", monitor=["val_loss"], once=True)
    assert page == tmp_path / "new" / "page.html"
    (tmp_path / "run-1.wandb").touch()
    with pytest.raises(ValueError, match="is empty"):
        follow(tmp_path / "run-1.wandb", tmp_path, monitor=["val_loss"], once=True)
    (tmp_path / "run-1.wandb").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.wandb file"):
        follow(tmp_path, tmp_path, monitor=["val_loss"])
    with pytest.raises(ValueError, match="interval=0"):
        follow(trained[0], tmp_path, monitor=["val_loss"], interval=0)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_a_browser_draws_it(trained: Any, width: int, dark: bool, tmp_path: Path) -> None:
    """Charts are there, no text is cut, and nothing is wider than the window."""
    page = follow(trained[0], tmp_path, monitor=["val_loss"], once=True)
    seen = drawn(page, width, dark, tmp_path)
    assert seen["svgs"] > 15
    assert seen["texts"] > 100


def test_read_while_wandb_writes(trained: Any) -> None:
    """Any prefix of the file makes a page."""
    (source,) = trained[0].glob("wandb/offline-run-*/*.wandb")
    whole = source.read_bytes()
    copy = trained[0] / "cut" / source.name
    copy.parent.mkdir()
    for cut in range(7, len(whole), len(whole) // 7):
        copy.write_bytes(whole[:cut])
        assert (
            data_of(live_page(offline_run(read_offline_run(copy)), ["val_loss"]))["measurements"]
            <= 6
        )


def test_the_ratio_of_stability_has_its_line_at_one() -> None:
    rows = [{"step": step, "stability/ratio": 0.1 * step, "stability/loss": 1.0} for step in (1, 2)]
    (section,) = [found for found in panels(rows, ["val_loss"]) if found["name"] == "Stability"]
    ratio, loss = section["charts"][:2]
    assert ratio["level"] == 1.0
    assert ratio["series"][0]["points"] == [(1, 0.1), (2, 0.2)]
    assert loss["level"] is None
    (card,) = cards(rows, [], [])
    assert card["question"] == "Is the step size stable?"
    assert card["numbers"] == "ratio 0.1 → 0.2"
    assert "below 1" in card["says"]
    (card,) = cards([{"step": 1, "stability/ratio": 1.2}], [], [])
    assert "above 1" in card["says"]

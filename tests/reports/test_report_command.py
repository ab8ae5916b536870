"""The command that writes a report."""

from __future__ import annotations

import pytest
from support.report_runs import logged, write_csv_run

from lightning_hessian.cli.main import main


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(5):
        write_csv_run(tmp_path / "logs" / f"run{seed}", logged(seed, 12), {"lr": seed})
    return tmp_path / "logs"


def test_the_command(logs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", str(logs), "--out", str(out), "--group", "lr"]) == 0
    printed = capsys.readouterr().out
    assert "hessian/d_ks with val_loss" in printed
    assert str(out / "report.html") in printed
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.html", "report.md", "correlations.csv", "correlations.json", "figures",
    }  # fmt: skip
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such file or folder, and a W&B path is ENTITY/PROJECT"),
        (["LOGS", "--monitor", "val_los"], "nearest: val_loss"),
        (["LOGS", "--statistic", "hesian/*"], "nearest: hessian/"),
        (["LOGS", "--group", "learning"], "in its config; nearest: lr"),
        (
            ["LOGS", "--at", "first"],
            "argument --at: 'first' cannot be used. Give 'last', 'best', or a step",
        ),
        (["LOGS", "--filter", "oops"], "--filter oops: write KEY=VALUE"),
        (["LOGS", "--workers", "0"], "--workers: '0' cannot be used. Give a whole number from 1"),
        (["LOGS", "--publish", "me"], "--publish: 'me' is not ENTITY/PROJECT"),
    ],
)
def test_errors_name_the_remedy(arguments, words, logs, tmp_path, capsys):
    arguments = [str(logs) if text == "LOGS" else text for text in arguments]
    assert main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.startswith("lightning-hessian: ")
    assert len(error.splitlines()) <= 2


def test_help_names_every_kind_of_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("W&B path", "offline", "CSVLogger", "TensorBoard", "examples:", "--publish"):
        assert word in text

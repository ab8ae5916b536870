"""The demo and the command line, as a user meets them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from support.runs import ended

from lightning_hessian.cli.digits import run_demo
from lightning_hessian.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_demo_logs_every_epoch_in_one_row_and_draws_the_spectrum(tmp_path, capsys):
    wandb.teardown()  # it reads its settings once in a process, and tests before may have used it
    figure = run_demo(tmp_path, num_epochs=4, num_eigenvalues=25)
    printed = capsys.readouterr().out
    assert "Correlation with val_loss" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert str(folder) in printed
    rows = ended(folder).rows
    measured = [row for row in rows if "hessian/d_ks" in row]
    assert len(measured) == 4
    assert all("val_loss" in row and "hessian/lambda_1" in row for row in measured)
    assert any("correlation/pearson_s_hat_val_loss" in row for row in rows)
    losses = [row["val_loss"] for row in measured]
    assert all(f"{loss:.4f}" in printed for loss in losses)
    assert losses[-1] < losses[0] / 2
    _assert_contract(rows, measured)
    _assert_figures_and_page(tmp_path, folder, rows, printed)


CONTRACT = {
    "d_ks", "d_c", "power_law", "p_value", "beta_hat", "beta_sigma", "s_hat", "lambda_1",
    "lambda_min", "trace", "trace_std_error", "eigengap_d_ks", "eigengap_s_hat",
    "num_eigenvalues", "num_converged", "block_off_diagonal_ratio", "num_hvps", "seconds",
}  # fmt: skip


def _assert_contract(rows, measured):
    """Every promised key, those of a measurement in the row of the monitor, and none elsewhere."""
    for row in measured:
        logged = {key.removeprefix("hessian/") for key in row if key.startswith("hessian/")}
        assert logged >= CONTRACT
        assert "val_loss" in row
    assert sum(any(key.startswith("hessian/") for key in row) for row in rows) == len(measured)
    keys = ["val_loss", *(f"hessian/{name}" for name in CONTRACT)]
    assert sum(all(key in row for key in keys) for row in rows) == len(measured)
    correlated = {"d_ks", "s_hat", "lambda_1", "trace", "eigengap_d_ks", "eigengap_s_hat"}
    logged = {key for row in rows for key in row if key.startswith("correlation/")}
    assert logged >= {f"correlation/pearson_{name}_val_loss" for name in correlated}
    assert "correlation/num_points" in logged


def _assert_figures_and_page(out, folder, rows, printed):
    """Figures of the first and the last measurement (the cadence is ten), and a page of it all."""
    steps = [row["trainer/global_step"] for row in rows if "figures/hessian_rank.path" in row]
    assert steps == [21, 87]
    page = out / "live.html"
    assert str(page) in printed
    assert '"measurements": 4' in page.read_text()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 1_000_000


def test_a_wrong_folder_ends_in_one_line_and_status_two(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lightning-hessian: ")
    assert len(error.splitlines()) == 1


def test_the_console_script_names_its_commands():
    script = Path(sys.executable).with_name("lightning-hessian")
    if not script.exists():
        pytest.skip("the package is not installed, only on the path")
    found = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "demo" in found.stdout
    missing = subprocess.run([script], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "COMMAND" in missing.stderr


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    assert "s_hat with val_loss: r = " in capsys.readouterr().out

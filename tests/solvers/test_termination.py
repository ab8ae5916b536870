"""SIGTERM and disks that do not take a checkpoint: no work is lost, and no cause is hidden."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.results import ArgumentError
from lightning_hessian.solvers import checkpoint as checkpoints
from lightning_hessian.solvers.lanczos import lanczos

JOB = """
import sys, time, signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.lanczos import lanczos
class Slow(MatrixOperator):
    def matvec(self, vector):
        print("product", flush=True)
        time.sleep({pause})
        return super().matvec(vector)
{before}
matrix = torch.diag(torch.linspace(1, 100, 200, dtype=torch.float64))
print("done", lanczos(Slow(matrix), 5, tol=1e-10, checkpoint=sys.argv[1]).num_products, flush=True)
"""


def _started(path: Path, pause: float = 0.05, before: str = "") -> subprocess.Popen[str]:
    code = JOB.format(pause=pause, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )


def _wait_for_products(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "product\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_state(tmp_path: Path, number: int) -> None:
    path = tmp_path / "run.lanczos"
    process = _started(path)
    _wait_for_products(process, 12)
    process.send_signal(number)
    process.wait(30)
    assert process.returncode in (-number, 1, 130)  # ended by it, or by KeyboardInterrupt
    assert checkpoints.header_of(path)["num_products"] >= 10
    matrix = torch.diag(torch.linspace(1, 100, 200, dtype=torch.float64))
    resumed = lanczos(MatrixOperator(matrix), 5, tol=1e-10, checkpoint=path)
    whole = lanczos(MatrixOperator(matrix), 5, tol=1e-10)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.num_products == whole.num_products


def test_sigterm_ends_a_long_product_at_once(tmp_path: Path) -> None:
    process = _started(tmp_path / "run.lanczos", pause=20)
    _wait_for_products(process, 1)
    started = time.monotonic()
    process.terminate()
    process.wait(15)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - started < 15


def test_a_handler_of_the_users_stays_in_charge(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGTERM, lambda *_: print('mine', flush=True))"
    process = _started(tmp_path / "run.lanczos", pause=0.001, before=before)
    _wait_for_products(process, 3)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "mine" in out
    assert "done" in out
    assert process.returncode == 0


def test_the_default_action_is_back_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    matrix = torch.diag(torch.arange(1.0, 30.0, dtype=torch.float64))
    lanczos(MatrixOperator(matrix), 3, checkpoint=tmp_path / "run.lanczos")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("kind", ["missing folder", "a folder", "below a file", "empty", "number"])
def test_an_unwritable_checkpoint_is_refused_before_the_first_product(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("")
    path = {
        "missing folder": tmp_path / "nope" / "x",
        "a folder": tmp_path,
        "below a file": tmp_path / "file" / "x",
        "empty": "",
        "number": 5,
    }[kind]

    class Untouched(MatrixOperator):
        def matvec(self, vector: torch.Tensor) -> torch.Tensor:
            raise AssertionError("a product was made")

    operator = Untouched(torch.eye(9))
    with pytest.raises(ArgumentError, match=r"^checkpoint="):
        lanczos(operator, 2, checkpoint=path)  # type: ignore[arg-type]


def test_a_disk_that_fills_up_hides_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    matrix = torch.diag(torch.arange(1.0, 200.0, dtype=torch.float64))
    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "run.lanczos"
    with pytest.warns(UserWarning, match="could not be written"):
        found = lanczos(MatrixOperator(matrix), 5, max_products=8, checkpoint=path)
    assert found.stopped == "bound"
    assert found.num_products == 8


def test_a_disk_that_fills_up_hides_no_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(MatrixOperator):
        count = 0

        def matvec(self, vector: torch.Tensor) -> torch.Tensor:
            self.count += 1
            if self.count > 7:
                raise RuntimeError("the cause")
            return super().matvec(vector)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    operator = Failing(torch.diag(torch.arange(1.0, 200.0, dtype=torch.float64)))
    with (
        pytest.warns(UserWarning, match="could not be written"),
        pytest.raises(RuntimeError, match="the cause"),
    ):
        lanczos(operator, 5, checkpoint=tmp_path / "run.lanczos")
    assert not list(tmp_path.iterdir())

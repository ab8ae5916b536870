"""What a report over many runs costs: 200 runs of 500 rows, real files, time and peak memory.

Writes the runs with wandb (offline) and with Lightning's CSVLogger into a temporary folder, then
runs ``lightning-hessian report`` on each in a process of its own, the start of Python included.

    OMP_NUM_THREADS=1 python benchmarks/reports.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STATISTICS = (
    "d_ks", "s_hat", "lambda_1", "trace", "eigengap_d_ks", "eigengap_s_hat",
    "block_off_diagonal_ratio",
)  # fmt: skip
OTHERS = ("d_c", "power_law", "p_value", "beta_hat", "beta_sigma", "lambda_min", "trace_std_error",
          "num_eigenvalues", "num_converged", "num_fitted", "num_hvps", "seconds")  # fmt: skip


def rows(seed: int, count: int) -> list[dict[str, float]]:
    """Return rows as the callback logs them: AR(1) statistics beside a falling loss."""
    rng = np.random.default_rng(seed)
    keys = [f"hessian/{name}" for name in (*STATISTICS, *OTHERS)]
    noise = rng.normal(size=(count, len(keys)))
    for step in range(1, count):
        noise[step] += 0.8 * noise[step - 1]
    loss = np.exp(-np.arange(count) / count) + 0.1 * noise[:, 0] + rng.uniform()
    values = np.exp(0.1 * noise) + rng.uniform(size=len(keys))
    return [
        {"val_loss": float(loss[k]), "epoch": k, **dict(zip(keys, values[k].tolist(), strict=True))}
        for k in range(count)
    ]


def write_offline(folder: Path, seed: int, history: list[dict[str, float]]) -> None:
    """Write a run with wandb."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    config = {"optimizer": f"o{seed % 4}", "num_parameters": 10 ** (3 + seed % 5)}
    run = wandb.init(mode="offline", dir=folder, config=config, settings=settings,
                     id=f"r{seed}")  # fmt: skip
    for step, row in enumerate(history):
        run.log({**row, "trainer/global_step": 10 * step})
    run.finish()


def write_csv(folder: Path, seed: int, history: list[dict[str, float]]) -> None:
    """Write a run with Lightning's CSVLogger."""
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(folder, name=f"run{seed:04}", version=0, flush_logs_every_n_steps=10**6)
    logger.log_hyperparams({"optimizer": f"o{seed % 4}", "num_parameters": 10 ** (3 + seed % 5)})
    for step, row in enumerate(history):
        logger.log_metrics(row, step=10 * step)
    logger.save()


def measure(folder: Path, out: Path, cache: Path) -> tuple[float, float, float]:
    """Return wall and CPU time in seconds, and peak memory of all processes together in MB."""
    command = [sys.executable, "-m", "lightning_hessian.cli.main", "report", str(folder),
               "--out", str(out), "--group", "optimizer", "--size", "num_parameters"]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"the report ended with {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return time.monotonic() - started, cpu, peak


def _memory(pid: int) -> float:
    """Return the memory of a process and its children in MB, shared pages counted once."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    total = 0.0
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total = int(found[1]) / 1e3 if found else 0.0
        total += sum(_memory(int(child)) for child in children.read_text().split())
    except (OSError, ProcessLookupError):  # it ended meanwhile
        pass
    return total


def main() -> None:
    """Write the runs, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args()
    writers = {"offline W&B": write_offline, "CSV": write_csv}
    print(f"{options.runs} runs of {options.rows} rows, {len(os.sched_getaffinity(0))} cores")
    with tempfile.TemporaryDirectory() as root:
        for kind, write in writers.items():
            folder = Path(root) / kind.replace(" ", "-")
            folder.mkdir()
            for seed in range(options.runs):
                write(folder, seed, rows(seed, options.rows))
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            for state in ("read for the first time", "from the cache"):
                seconds, cpu, memory = measure(folder, Path(root) / "out", Path(root) / "cache")
                what = f"{kind} ({size / 1e6:.0f} MB), {state}"
                print(f"{what:<48} {seconds:6.1f} s {cpu:6.1f} CPU s {memory:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()

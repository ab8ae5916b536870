"""What a user feels of a sidecar: a fit with one on the other core, over the fit alone.

    OMP_NUM_THREADS=1 python benchmarks/sidecar.py [--data-dir DATA] [--epochs 20] [--rounds 3]

Each fit is a process of its own on one core, with a checkpoint after every epoch; the sidecar is
`lightning-hessian measure --follow` on another. A round is the fit alone and the fit beside a
sidecar, one after the other; ratios are of one round, and the median over rounds is told.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIT_CORE, SIDECAR_CORE = 0, 1


def make_fit(folder: Path, epochs: int, data_dir: Path | None) -> None:
    """Train LeNet with a checkpoint after each epoch, and print what that took."""
    import lightning as L
    import torch
    from fit import digits
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from sidecar_project import Net
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, validate = (TensorDataset(*part) for part in digits(data_dir))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=CSVLogger(folder),
        callbacks=[ModelCheckpoint(folder / "checkpoints", save_top_k=-1, monitor="val_loss")],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(Net(), DataLoader(train, 64, shuffle=True), DataLoader(validate, 500))
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    weights = [float(p.detach().double().sum()) for p in trainer.lightning_module.parameters()]
    (folder / "fit.json").write_text(json.dumps(found | {"weights": weights}))


def started(command: list[str], core: int, data_dir: Path | None) -> subprocess.Popen[bytes]:
    """Start a process on one core with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment["SIDECAR_DATA"] = str(data_dir or "")
    process = subprocess.Popen(
        [sys.executable, *command], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        os.sched_setaffinity(process.pid, {cores[core]})
    return process


def processor_time(process: subprocess.Popen[bytes]) -> float:
    """Return the seconds of processor that a process has had so far; Linux only, else NaN."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def fitted(options: argparse.Namespace, beside: bool) -> dict[str, Any]:
    """Return the times of a fit, and how many spectra a sidecar measured meanwhile."""
    with tempfile.TemporaryDirectory() as place:
        run, out = Path(place) / "run", Path(place) / "out"
        run.mkdir()
        processes = []
        if beside:
            project = HERE / "sidecar_project.py"
            command = ["-m", "lightning_hessian.cli.main", "measure", str(run / "checkpoints"),
                       "--follow", "--module", f"{project}:Net", "--data",
                       f"{project}:train_loader", "--out", str(out)]  # fmt: skip
            processes.append(started(command, SIDECAR_CORE, options.data_dir))
            while not (out / "sidecar.json").exists():
                if processes[0].poll() is not None:
                    raise RuntimeError("the sidecar has ended at once")
                time.sleep(0.1)
        before = sum(map(processor_time, processes))
        try:
            command = [str(HERE / "sidecar.py"), "--fit", str(run), "--epochs", str(options.epochs)]
            if options.data_dir is not None:
                command += ["--data-dir", str(options.data_dir)]
            processes.append(started(command, FIT_CORE, options.data_dir))
            if processes[-1].wait() != 0:
                raise RuntimeError("the fit has failed")
            found: dict[str, Any] = json.loads((run / "fit.json").read_text())
            # One more may be at work; what is left would be measured after the run.
            busy = sum(map(processor_time, processes[:-1])) - before
            return found | {"spectra": len(list(out.glob("spectra/*.npz"))), "busy": busy}
        finally:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()


def main() -> None:
    """Print one row a round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="by default synthetic stand-ins")
    parser.add_argument("--epochs", type=int, default=20, help="of the fit (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.fit is not None:
        make_fit(options.fit, options.epochs, options.data_dir)
        return
    print(f"LeNet, 10,000 images, {options.epochs} epochs, one thread each, "
          f"{'synthetic data' if options.data_dir is None else 'real data'}\n")  # fmt: skip
    print(
        "| round | fit alone, wall | processor | beside a sidecar, wall | processor "
        "| ratio, wall | ratio, processor | spectra meanwhile | processor of the sidecar |"
    )  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(options.rounds):
        alone, beside = fitted(options, beside=False), fitted(options, beside=True)
        assert alone["weights"] == beside["weights"]
        for clock, found in ratios.items():
            found.append(beside[clock] / alone[clock])
        print(
            f"| {number + 1} | {alone['wall']:.1f} s | {alone['cpu']:.1f} s | {beside['wall']:.1f} "
            f"s | {beside['cpu']:.1f} s | {ratios['wall'][-1]:.3f} | {ratios['cpu'][-1]:.3f} "
            f"| {beside['spectra']} | {beside['busy']:.1f} s |",
            flush=True,
        )
    wall, cpu = (statistics.median(ratios[clock]) for clock in ("wall", "cpu"))
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"\nmedian ratio: {wall:.3f} by the clock on the wall, {cpu:.3f} in processor time of "
          f"the fit; load {load}")  # fmt: skip


if __name__ == "__main__":
    main()

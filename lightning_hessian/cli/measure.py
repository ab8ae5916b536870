"""`lightning-hessian measure`: spectra of checkpoints already on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.cli.arguments import (
    a_device,
    a_path,
    a_text,
    named_values,
    package_name,
    read_as,
)
from lightning_hessian.measure.arguments import RULES
from lightning_hessian.results.arguments import (
    glob,
    live_interval,
    num_workers,
    one_of,
    whole_number,
)

SUMMARY = "measure the spectra of checkpoints already on disk"
DESCRIPTION = """\
Loads each checkpoint into its LightningModule, measures the Hessian of the loss on fixed probe
batches, and writes to the output folder: metrics.csv with a row for each checkpoint, which
`lightning-hessian report` reads; spectra/NAME.npz, which lightning_hessian.results.load_spectrum
reads; and spectra_hessian.jsonl, which the figures read.

A checkpoint that has been measured is not measured again, and a measurement that was stopped goes
on where it was: run the same command again.

A checkpoint that cannot be read or measured does not stop the others. It is named at the end, and
the exit code is then 1, or 2 where not one of them could be measured.

With --follow it is a sidecar: it stays beside a run that is going on, measures each checkpoint as
it appears, the newest first, and those that were left when nothing newer is there. It never writes
into the run's folder. It ends when the run has, and where it was stopped it goes on.

examples:
  lightning-hessian measure logs/version_0/checkpoints/*.ckpt --module project.model:Classifier \\
      --data project.data:MNISTData --out spectra_of_version_0
  lightning-hessian measure last.ckpt --module train.py:Net --data train.py:batches \\
      --parameters 'head.*' --num-eigenvalues 1000 --loss train.py:loss_fn
  lightning-hessian report spectra_of_version_0 --monitor val_loss
  lightning-hessian measure logs/version_0/checkpoints --follow --module train.py:Net \\
      --data train.py:Data --out spectra_of_version_0
  lightning-hessian report logs/version_0 spectra_of_version_0
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    argument: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    count = read_as(int, RULES["num_eigenvalues"])
    add("checkpoints", nargs="+", type=a_path, metavar="CKPT", help="a file, or a folder of them")
    text = "the LightningModule, in a package or a file.py"
    add("--module", type=package_name, required=True, metavar="PKG:CLASS", help=text)
    text = "a LightningDataModule, or a function that returns one, a DataLoader or a list of "
    text += "batches; by default the module's own loaders"
    add("--data", type=package_name, metavar="PKG:NAME", help=text)
    text = "argument that the checkpoint does not hold (VALUE in JSON, else text); may be repeated"
    add("--module-arg", **argument, help=text)
    add("--data-arg", **argument, help="argument of --data; may be repeated")
    add("--split", choices=("train", "val"), default="train", help="(%(default)s)")
    batches = read_as(int, CALLBACK_RULES["num_batches"])
    add("--num-batches", type=batches, default=4, help="probe batches (%(default)s)")
    add("--num-eigenvalues", type=count, metavar="K", help="(50; 1000 under pooled_slq)")
    text = "which parameters; may be repeated (all that require grad)"
    add("--parameters", action="append", type=read_as(str, glob), metavar="GLOB", help=text)
    text = "loss(module, batch) -> mean loss (hessian_loss, else training_step)"
    add("--loss", type=package_name, metavar="PKG:FUNCTION", help=text)
    text = "converged or pooled_slq (%(default)s)"
    protocol = read_as(str, one_of("converged", "pooled_slq"))
    add("--protocol", type=protocol, default="converged", help=text)
    text = "residual over eigenvalue (%(default)s)"
    add("--tol", type=read_as(float, RULES["tol"]), default=1e-3, help=text)
    text = "bound on Hessian-vector products for each checkpoint"
    add("--max-products", type=count, metavar="N", help=text)
    limit = read_as(float, live_interval)
    text = "bound on the seconds of each checkpoint; what has converged by then is kept"
    add("--max-seconds", type=limit, metavar="SECONDS", help=text)
    add("--hvp", type=read_as(str, RULES["hvp"]), default="auto", help="engine (%(default)s)")
    text = "hessian or gauss_newton, for losses made of torch's own (%(default)s)"
    add("--matrix", type=read_as(str, RULES["matrix"]), default="hessian", help=text)
    probes = read_as(int, RULES["trace_probes"])
    add("--trace-probes", type=probes, default=16, help="0 for no trace (%(default)s)")
    add("--device", type=a_device, default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)")
    add("--seed", type=read_as(int, RULES["seed"]), default=0, help="(%(default)s)")
    text = "run the validation of each checkpoint too, for its metrics"
    add("--validate", action="store_true", help=text)
    text = "load checkpoints that hold more than tensors and primitives (code)"
    add("--trust", action="store_true", help=text)
    add("--again", action="store_true", help="measure what has been measured, too")
    add("--out", type=a_path, default=Path("hessian_measure"), help="folder (%(default)s)")
    _configure_following(parser)


def _configure_following(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beside a run that is going on")
    add = group.add_argument
    text = "measure the checkpoints of one folder as they appear, until the run has ended"
    add("--follow", action="store_true", help=text)
    text = "the run that writes them: its log folder, offline W&B run folder, or W&B path "
    text += "ENTITY/PROJECT/RUN (what lies around the checkpoints)"
    add("--run", dest="of_run", type=a_text, metavar="RUN", help=text)
    seconds: dict[str, Any] = {"type": read_as(float, live_interval), "metavar": "SECONDS"}
    text = "the run has ended when nothing has changed for so long (600, and three times the "
    text += "longest time between two checkpoints)"
    add("--idle", **seconds, help=text)
    pid = read_as(int, whole_number(least=1))
    text = "the run's process on this machine: the run has ended when it is gone"
    add("--pid", type=pid, metavar="PID", help=text)
    add("--interval", **seconds, default=2.0, help="between two looks (%(default)g)")
    threads = read_as(int, num_workers)
    add("--threads", type=threads, metavar="N", help="of the processor (1 with --device cpu)")
    text = "log to W&B too: a run beside the run, in its group"
    add("--wandb", action="store_true", help=text)
    text = "with --wandb: log into the run itself, which must be in shared mode, too"
    add("--wandb-shared", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns 1 where some checkpoints could not be measured."""
    from lightning_hessian.cli.checkpoint_spectra import measure_checkpoints

    no_value = "--%s-arg {!r} is not NAME=VALUE."
    options.module_arg = named_values(options.module_arg, no_value % "module")
    options.data_arg = named_values(options.data_arg, no_value % "data")
    if options.follow:
        from lightning_hessian.cli.follow import follow_run

        return follow_run(options)
    for name in ("of_run", "idle", "pid", "threads", "wandb", "wandb_shared"):
        if getattr(options, name):
            option = name.removeprefix("of_").replace("_", "-")
            raise ValueError(f"--{option} belongs to --follow. Give that, too.")
    return measure_checkpoints(options)

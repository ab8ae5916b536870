"""`lightning-hessian measure`: spectra of checkpoints already on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightning_hessian.callbacks.arguments import CALLBACK_RULES
from lightning_hessian.cli.arguments import a_device, a_path, named_values, package_name, read_as
from lightning_hessian.measure.arguments import RULES
from lightning_hessian.results.arguments import glob, one_of

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

examples:
  lightning-hessian measure logs/version_0/checkpoints/*.ckpt --module project.model:Classifier \\
      --data project.data:MNISTData --out spectra_of_version_0
  lightning-hessian measure last.ckpt --module train.py:Net --data train.py:batches \\
      --parameters 'head.*' --num-eigenvalues 1000 --loss train.py:loss_fn
  lightning-hessian report spectra_of_version_0 --monitor val_loss
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
    add("--max-hvps", type=count, help="bound on products for each checkpoint")
    add("--hvp", type=read_as(str, RULES["hvp"]), default="auto", help="engine (%(default)s)")
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


def run(options: argparse.Namespace) -> int:
    """Run the command; returns 1 where some checkpoints could not be measured."""
    from lightning_hessian.cli.checkpoint_spectra import measure_checkpoints

    no_value = "--%s-arg {!r} is not NAME=VALUE."
    options.module_arg = named_values(options.module_arg, no_value % "module")
    options.data_arg = named_values(options.data_arg, no_value % "data")
    return measure_checkpoints(options)

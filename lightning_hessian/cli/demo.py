"""`lightning-hessian demo`: train on real digits, log offline, draw the spectrum."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_hessian.cli.arguments import a_path

SUMMARY = "train on real digits, log offline, draw the spectrum"
DESCRIPTION = (
    "Trains a small network on scikit-learn's handwritten digits with HessianSpectrumCallback and "
    "an offline W&B run, prints the statistics epoch by epoch and their correlation with the "
    "validation loss, with the verdict on each, draws the spectrum, and writes the page of the run "
    "and its report."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--out", type=a_path, default=Path("demo_output"), help="folder to write to (%(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from lightning_hessian.cli.digits import run_demo
    from lightning_hessian.results.output import check_folder

    check_folder(options.out)
    run_demo(options.out)

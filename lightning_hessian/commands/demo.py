"""`lightning-hessian demo`: train on real digits, log offline, draw the spectrum."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_hessian.commands.arguments import a_path

SUMMARY = "train on real digits, log offline, draw the spectrum"
DESCRIPTION = (
    "Trains a small network on scikit-learn's handwritten digits with HessianSpectrumCallback and "
    "an offline W&B run, prints the statistics epoch by epoch and their correlation with the "
    "validation loss, and draws the spectrum."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "--out", type=a_path, default=Path("demo_output"), help="folder to write to (%(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    """Runs the command."""
    from lightning_hessian.demo import run_demo

    run_demo(options.out)

"""The command line: `lightning-hessian demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 after printing one or two lines on what was wrong.

    Args:
        arguments: Those of the command line by default.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lightning-hessian: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    from lightning_hessian import __version__

    parser = argparse.ArgumentParser(
        prog="lightning-hessian",
        description="Hessian spectra of PyTorch Lightning runs.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train on real digits, log offline, draw the spectrum",
        description="Trains a small network on scikit-learn's handwritten digits with "
        "HessianSpectrumCallback and an offline W&B run, prints the statistics epoch by epoch and "
        "their correlation with the validation loss, and draws the spectrum.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder to write to (%(default)s)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from lightning_hessian.demo import run_demo

    run_demo(options.out)


if __name__ == "__main__":
    sys.exit(main())

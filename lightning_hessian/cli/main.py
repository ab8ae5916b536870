"""The command line: `lightning-hessian COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = ("demo", "measure", "report", "workspace")
"""Each is a module of `lightning_hessian.cli`, imported light: the work is behind ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 after printing one or two lines on what was wrong.

    1 stands for work that was done in part, which the command has said.

    Args:
        arguments: Those of the command line by default.
    """
    try:
        options = _parser().parse_args(arguments)
        code = options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lightning-hessian: {error}", file=sys.stderr)
        return 2
    return code or 0


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as `main` says everything else."""

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError with the message."""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    from lightning_hessian import __version__

    parser = _Parser(
        prog="lightning-hessian", description="Hessian spectra of PyTorch Lightning runs."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"lightning_hessian.cli.{name}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())

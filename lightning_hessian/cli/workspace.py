"""`lightning-hessian workspace ENTITY/PROJECT`: build the W&B dashboard."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lightning_hessian.cli.arguments import a_path, a_text, entity_and_project
from lightning_hessian.results.output import check_file
from lightning_hessian.results.outside import reason

SUMMARY = "build the W&B dashboard"
DESCRIPTION = (
    "Saves a view to a W&B project with the sections Generalization, Sharpness, Spectrum, Blocks, "
    "Gradients and Cost, over all of its runs. Needs a W&B account (`wandb login`) and the extra "
    "'workspaces'; with --spec the view is written to a file, without account or network."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("path", metavar="ENTITY/PROJECT", type=entity_and_project, help="where the view belongs")
    text = "monitored metric; may be given several times (val_loss and gap)"
    add("--monitor", action="append", type=a_text, metavar="METRIC", help=text)
    add("--name", type=a_text, default="Hessian spectra", help="of the view (%(default)s)")
    text = "write the view as JSON here instead of saving it"
    add("--spec", type=a_path, metavar="FILE", help=text)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from lightning_hessian.tracking.dashboard import build_workspace, workspace_json

    entity, _, project = options.path.partition("/")
    if options.spec is not None:
        check_file(options.spec, "--spec")
    monitors = options.monitor or ["val_loss", "gap"]
    workspace = build_workspace(entity, project, monitor=monitors, name=options.name)
    place = options.spec
    if place is None:
        place = _saved(workspace, options.path)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(workspace_json(workspace), indent=1) + "\n")
    print(f"View: {place}")


def _saved(workspace: Any, path: str) -> str:
    """Save a workspace, and return its address."""
    try:
        return str(workspace.save().url)
    except Exception as error:  # wandb raises errors of many kinds, none of which it promises
        raise ConnectionError(
            f"W&B did not take the view of {path}: {reason(error).rstrip('.')}. Check the network, "
            "`wandb login` (or WANDB_API_KEY) and the name of the project, or write the view to a "
            "file with --spec FILE."
        ) from error

"""Run the experiments on what HBS says: numbers to JSON files, figures, and tables to read.

    python examples/block_structure/experiments.py --only hbs_size --out DIR
    python examples/block_structure/experiments.py --data-dir DATA --out DIR     # all of them

Each states its setting in its own module, and takes minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import class_maps
import four_layers
import hbs_size
import optimizer_gap
import rare_classes
import torch
import two_losses
from records import save

EXPERIMENTS: dict[str, Any] = {
    "hbs_size": hbs_size,
    "class_maps": class_maps,
    "four_layers": four_layers,
    "optimizer_gap": optimizer_gap,
    "rare_classes": rare_classes,
    "two_losses": two_losses,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen experiments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(EXPERIMENTS), help="(all of them)")
    add("--data-dir", type=Path, help="folder with MNIST/raw; scikit-learn's digits without it")
    add("--out", type=Path, default=Path("block_structure_output"), help="(%(default)s)")
    add("--figures", type=Path, help="another folder for the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.only or EXPERIMENTS:
        module = EXPERIMENTS[name]
        settings = module.Settings()
        print(f"{name}: {settings}\n", flush=True)
        begun = time.process_time()
        outcome = module.measure(settings, options.data_dir)
        took = time.process_time() - begun
        files = save(name, settings, outcome, took, options.out, options.figures or options.out)
        print("\n".join(outcome.lines))
        print(f"\n{took:.0f} s of one core; {', '.join(map(str, files))}\n", flush=True)


if __name__ == "__main__":
    main()

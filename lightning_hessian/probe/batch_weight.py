"""What the mean loss of a batch is a mean over: its tokens, or its samples.

The rule, where no ``batch_weight`` is given:

1. Batches that hold integer ``labels`` of which some are -100 (in any of the batches) weigh by
   the labels that are not, because Hugging Face's losses, like ``cross_entropy``, leave out -100.
   So do batches whose sequences of labels differ in length, where the module says what it is.
   A causal language model predicts each token from those before it, so that the first label of
   each sequence does not count; a token classifier, a masked language model and an
   encoder-decoder use every label. Which of them it is, the module says: its class (or that of
   one of its base classes, ``...ForCausalLM``, ``...LMHeadModel``, ``...ForTokenClassification``
   and the like), else its ``config`` (``is_encoder_decoder``, ``architectures``,
   ``is_decoder``). The outermost module that says something decides, so that a LightningModule,
   a compiled module or a PEFT wrapper is looked through. Where nothing is said, every label
   counts.
2. Other batches weigh by their number of samples: the first dimension that all their tensors
   have in common. Tensors alone cannot tell [samples, time] from [time, samples]. Vectors (one
   label a sample) do; else a module that holds an ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``,
   ``nn.MultiheadAttention`` or Transformer layer with ``batch_first=False`` is taken to be fed
   [time, samples, ...] of two or three dimensions, and the second dimension is counted.
3. Where the two dimensions would give the batches different shares, and neither vectors nor the
   module decide, a warning names what was counted, and ``batch_weight``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_hessian.linear.ranks import Ranks

_IGNORED = -100
_CAUSAL = re.compile(r"ForCausalLM|LMHeadModel|DoubleHeadsModel")
_TASK = re.compile(
    r"For(MaskedLM|TokenClassification|SequenceClassification|QuestionAnswering|MultipleChoice"
    r"|Seq2SeqLM|ImageClassification|SemanticSegmentation|AudioClassification|CTC)"
)
_CONDITIONAL = "ForConditionalGeneration"
_REMEDY = "Give batch_weight(batch) -> float"


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a batch say about the number of samples.

    Attributes:
        tokens: Labels that count; None where the batch holds no integer labels.
        length: Labels of a sample that may count; None where they are no sequences.
        has_ignored: Whether some label is -100.
        firsts: First dimensions of all tensors that have one.
        seconds: Second dimensions of those that have one.
        vectors: Lengths of the vectors.
        has_sequences: Whether all tensors have at most three dimensions, and one has two or more.
    """

    tokens: int | None
    length: int | None
    has_ignored: bool
    firsts: frozenset[int]
    seconds: frozenset[int]
    vectors: frozenset[int]
    has_sequences: bool


def batch_weights(
    module: nn.Module,
    batches: Sequence[Any],
    batch_weight: Callable[[Any], float] | None,
    ranks: Ranks,
) -> tuple[float, ...]:
    """Return the weights of this rank's batches in the mean over those of all ranks.

    Args:
        module: The module, asked what its loss is a mean over.
        batches: Those held here.
        batch_weight: ``batch_weight(batch) -> float``, which decides where it is given.
        ranks: Who holds batches; all ranks make this call.

    Raises:
        ValueError: ``batch_weight`` gave a weight that is negative or not finite, or the number
            of samples cannot be told.
    """
    if batch_weight is not None:
        given = tuple(float(batch_weight(batch)) for batch in batches)
        if not all(math.isfinite(w) and w >= 0 for w in given):
            raise ValueError(f"batch_weight gave {given}; weights must be >= 0, with a sum > 0.")
        return given
    said = _said(module)
    own = [sizes_of(batch, bool(said)) for batch in batches]
    if ranks.world > 1:
        ranks.stay_together()
    parts = ranks.all_gather_object(own)
    # Batches are dealt out in turn; so they come back in the order in which they were given.
    longest = max(len(part) for part in parts)
    every = [part[i] for i in range(longest) for part in parts if i < len(part)]
    lengths = {sizes.length for sizes in every}
    by_tokens = said is not None and None not in lengths and len(lengths) > 1
    weights, warning = _decided(every, _is_sequence_first(module), by_tokens)
    if warning is not None and ranks.rank == 0:
        warnings.warn(warning, stacklevel=2)
    return tuple(weights[i * ranks.world + ranks.rank] for i in range(len(own)))


def sizes_of(batch: Any, shifted: bool) -> Sizes:
    """Return what a batch says; ``shifted`` leaves out the first label of each sequence."""
    shapes: list[tuple[int, ...]] = []
    apply_to_collection(batch, Tensor, lambda t: shapes.append(tuple(t.shape)))
    shapes = [shape for shape in shapes if shape]
    labels = _labels(batch)
    tokens, length, has_ignored = None, None, False
    if labels is not None:
        has_ignored = bool((labels == _IGNORED).any())
        counted = labels[..., 1:] if shifted and labels.ndim > 1 else labels
        tokens = int((counted != _IGNORED).sum())
        length = counted.shape[1] if labels.ndim == 2 else None
    return Sizes(
        tokens,
        length,
        has_ignored,
        frozenset(shape[0] for shape in shapes),
        frozenset(shape[1] for shape in shapes if len(shape) > 1),
        frozenset(shape[0] for shape in shapes if len(shape) == 1),
        bool(shapes) and 2 <= max(map(len, shapes)) <= 3,
    )


def _labels(batch: Any) -> Tensor | None:
    """Return the integer labels of a batch, from a mapping or an object."""
    if isinstance(batch, Tensor):
        return None
    labels = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        return None
    return None if labels.is_floating_point() or labels.is_complex() else labels


def predicts_next(module: nn.Module) -> bool:
    """Return whether the loss leaves out the first label of each sequence (a causal model)."""
    return bool(_said(module))


def _said(module: nn.Module) -> bool | None:
    """Return what the outermost part that says something says, None where none does."""
    return next((said for part in module.modules() if (said := _is_causal(part)) is not None), None)


def _is_causal(part: nn.Module) -> bool | None:
    """Return what a module says of itself, None where it says nothing."""
    config = getattr(part, "config", None)
    encoded = bool(_of(config, "is_encoder_decoder"))
    names = [kind.__name__ for kind in type(part).__mro__]
    architectures = _of(config, "architectures")
    if isinstance(architectures, (list, tuple)):
        names += [str(name) for name in architectures]
    for name in names:
        if _CAUSAL.search(name):
            return not encoded
        if _TASK.search(name):
            return False
        if _CONDITIONAL in name:  # an encoder-decoder, or a language model that is shown images
            return config is not None and not encoded
    if encoded:
        return False
    return True if _of(config, "is_decoder") is True else None


def _of(config: Any, name: str) -> Any:
    """Return an entry of a configuration, which may be an object or a mapping."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _is_sequence_first(module: nn.Module) -> bool:
    kinds = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer)
    return any(isinstance(m, kinds) and m.batch_first is False for m in module.modules())


def _decided(
    every: Sequence[Sizes], sequence_first: bool, by_tokens: bool
) -> tuple[list[float], str | None]:
    """Return the weights of all batches, and what to warn of."""
    if by_tokens or any(sizes.has_ignored for sizes in every):
        missing = [i for i, sizes in enumerate(every) if sizes.tokens is None]
        if missing and len(every) > 1:
            raise ValueError(
                f"Some probe batches hold labels that are -100, and weigh by the others; probe "
                f"batch {missing[0]} holds no labels. {_REMEDY}."
            )
        return [float(sizes.tokens or 0) for sizes in every], None
    firsts = [_only(sizes.firsts) for sizes in every]
    seconds = [_second(sizes) for sizes in every]
    have_vectors = all(sizes.vectors for sizes in every)
    if None in firsts and None not in seconds and sequence_first and have_vectors:
        # One label a sample: the vectors are as long as the second dimension.
        return [float(second or 0) for second in seconds], None
    if None in firsts:
        if len(every) == 1:
            return [1.0], None
        raise ValueError(
            f"The number of samples of probe batch {firsts.index(None)} cannot be told from its "
            f"tensors (their first dimensions differ, or there are none). {_REMEDY}."
        )
    first = [float(size or 0) for size in firsts]
    if None in seconds or any(sizes.vectors for sizes in every):
        return first, None
    second = [float(size or 0) for size in seconds]
    same = _shares(first) == _shares(second)
    use_second = sequence_first and all(sizes.has_sequences for sizes in every)
    if use_second and (same or len(set(first)) == 1):
        return second, None
    # First dimensions that are alike beside second ones that differ may be [samples, time], filled
    # up to the longest of each batch, or [time, samples] with fewer samples in the last batch.
    if not use_second and (len(set(first)) > 1 or len(set(second)) == 1):
        return first, None
    chosen, name = (second, "second") if use_second and len(set(second)) > 1 else (first, "first")
    return chosen, (
        f"The probe batches' tensors begin with {_listed(first)} and go on with {_listed(second)}: "
        "which of the two is the number of samples cannot be told, and it decides how much a "
        f"batch counts. The {name} dimension was counted. {_REMEDY} to say what each loss is a "
        "mean over, for example batch_weight=lambda batch: batch[0].shape[1]."
    )


def _only(sizes: frozenset[int]) -> int | None:
    return next(iter(sizes)) if len(sizes) == 1 else None


def _second(sizes: Sizes) -> int | None:
    """Return the second dimension that all tensors have in common, and vectors as their length."""
    second = _only(sizes.seconds)
    if second is None or not sizes.vectors or sizes.vectors == {second}:
        return second
    return None


def _shares(sizes: Sequence[float]) -> list[float]:
    total = math.fsum(sizes) or 1.0
    return [round(size / total, 12) for size in sizes]


def _listed(sizes: Sequence[float]) -> str:
    shown = ", ".join(f"{size:.0f}" for size in sizes[:6])
    return f"{shown}, ..." if len(sizes) > 6 else shown

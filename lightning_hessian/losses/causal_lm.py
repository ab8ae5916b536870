"""The loss of Hugging Face's causal language models, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.linear.rng import preserved_rng
from lightning_hessian.losses.linear_head import linear_cross_entropy
from lightning_hessian.results import MeasurementError

_IGNORED = -100
_WINDOW = 16
"""Tokens of the check against the model's own loss."""

_LOGIT = 50.0
"""What stands for a logit while the last layer is passed over: large, so that a cap would show."""

_OTHERWISE = "Use the model's own loss: loss_fn=lambda model, batch: model(**batch).loss."

_checked: WeakSet[nn.Module] = WeakSet()


def causal_lm_loss(
    module: nn.Module, batch: Mapping[str, Any], *, chunk_size: int | None = None
) -> Tensor:
    """Return the loss of a causal language model of Hugging Face, in chunks of tokens.

    To be given as ``loss_fn``. It is the mean cross-entropy of each token whose label is not -100,
    given those before it, as ``module(**batch).loss`` is. The model runs up to its last layer; what
    that is given goes through `linear_cross_entropy` with its weight, which may be tied to the
    embedding. Models in a LightningModule, or with PEFT adapters around, are found inside.

    The first time, the model's own loss on a few tokens of the batch is compared: a model that does
    more than that (caps its logits, adds a loss of its routers) is refused.

    Args:
        module: A model with a last linear layer (``get_output_embeddings()``), or one around it.
        batch: The arguments of its ``forward``, with ``labels`` [batch, time].
        chunk_size: Tokens whose logits are held at a time; see `linear_cross_entropy`.

    Raises:
        MeasurementError: There is no such model, there are no labels, or its own loss is another.

    Example:
        With the model and the batches of one's own::

            hessian_spectrum(model, causal_lm_loss, batches)
            HessianSpectrumCallback(loss_fn=causal_lm_loss)
    """
    model, head = _model_and_head(module)
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        held = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise MeasurementError(
            f"causal_lm_loss: the batch holds no tensor 'labels' (got {held}). Give a mapping with "
            "the arguments of the model's forward; labels of -100 do not count."
        )
    if model not in _checked and not torch._C._functorch.get_interpreter_stack():
        _check(model, head, batch)
        _checked.add(model)
    return _loss(model, head, batch, chunk_size)


class _Given(NamedTuple):
    """What the last layer was called with, and the parameters that it had then."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _model_and_head(module: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the outermost module that knows its last layer, and that layer."""
    for part in module.modules():
        get = getattr(part, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Linear):
            return part, head
        if head is not None:
            raise MeasurementError(
                f"causal_lm_loss: the last layer of {type(part).__name__} is {type(head).__name__},"
                f" not a plain nn.Linear (an adapter around it?). {_OTHERWISE}"
            )
    raise MeasurementError(
        f"causal_lm_loss: {type(module).__name__} holds no model whose get_output_embeddings() is "
        "a linear layer. Give loss_fn(module, batch) of your own."
    )


def _loss(model: nn.Module, head: nn.Linear, batch: Mapping[str, Any], size: int | None) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels: Tensor = batch["labels"]
    given: list[_Given] = []
    with _last_layer_passed_over(head, given):
        model(**inputs)
    if len(given) != 1 or given[0].hidden.shape[:-1] != labels.shape:
        shapes = [tuple(hidden.shape) for hidden, _, _ in given]
        raise MeasurementError(
            f"causal_lm_loss: the last layer was called on {shapes} for labels of shape "
            f"{tuple(labels.shape)}; once, with a state for each label, was expected. {_OTHERWISE}"
        )
    # Each state predicts the token after it; the last one predicts none.
    following = F.pad(labels[..., 1:], (0, 1), value=_IGNORED)
    hidden, weight, bias = given[0]
    return linear_cross_entropy(
        hidden, weight, following, bias, ignore_index=_IGNORED, chunk_size=size
    )


@contextmanager
def _last_layer_passed_over(head: nn.Linear, given: list[_Given]) -> Iterator[None]:
    """Open a block in which the last layer notes what it is given, and computes nothing.

    It returns one number a token in the place of its logits.
    """

    def forward(hidden: Tensor) -> Tensor:
        # Here, and not later: where parameters are in shards, they are whole in this call alone.
        given.append(_Given(hidden, head.weight, head.bias))
        return torch.full_like(hidden[..., :1], _LOGIT)

    before = vars(head).get("forward")
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


# The check --------------------------------------------------------------------------------------


def _check(model: nn.Module, head: nn.Linear, batch: Mapping[str, Any]) -> None:
    """Compare with the model's own loss on a few tokens.

    Raises:
        MeasurementError: They differ.
    """
    few = _few_tokens(batch)
    if few is None:
        return
    with torch.no_grad():
        with preserved_rng():
            _check_logits(model, head, few)
        with preserved_rng():
            own = _entry(model(**few), "loss")
        with preserved_rng():
            found = float(_loss(model, head, few, None))
    if own is None:
        raise MeasurementError(
            f"causal_lm_loss: {type(model).__name__} returns no loss for a batch with labels, so "
            "what it is cannot be checked. Give loss_fn(module, batch) of your own."
        )
    # Its own loss is computed in float32 at best.
    tolerance = max(torch.finfo(dtype).eps for dtype in (head.weight.dtype, torch.float32)) ** 0.5
    if abs(found - float(own)) <= tolerance * max(1.0, abs(float(own))):
        return
    raise MeasurementError(
        f"causal_lm_loss: {type(model).__name__} gives a loss of {float(own):.6g} where the "
        f"cross-entropy of its last layer is {found:.6g}: something is added to the loss, or the "
        f"mean is another one. {_OTHERWISE}"
    )


def _check_logits(model: nn.Module, head: nn.Linear, few: Mapping[str, Any]) -> None:
    """Check that what the last layer returns are the logits, untouched.

    A cap or a factor would hardly show in the loss of a model whose logits are small yet.

    Raises:
        MeasurementError: They are something else.
    """
    with _last_layer_passed_over(head, []):
        output = model(**{name: value for name, value in few.items() if name != "labels"})
    logits = _entry(output, "logits")
    if logits is not None and not bool((logits == _LOGIT).all()):
        raise MeasurementError(
            f"causal_lm_loss: {type(model).__name__} scales or caps what its last layer returns "
            f"({_LOGIT} became {float(logits.reshape(-1)[0]):.6g}), which would be left out. "
            f"{_OTHERWISE}"
        )


def _entry(output: Any, name: str) -> Tensor | None:
    """Return a tensor of what a model returned, by name; None where there is none."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _few_tokens(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a part of one sequence with labels that count; None where no label does."""
    labels: Tensor = batch["labels"]
    if labels.ndim != 2:
        return None
    counts = labels[:, 1:] != _IGNORED
    if not bool(counts.any()):
        return None
    row = int(counts.sum(1).argmax())
    first = int(counts[row].to(torch.int8).argmax())
    window = slice(first, first + _WINDOW)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if len(value) == len(labels):
            value = value[row : row + 1]
        for dim in range(1, value.ndim):
            if value.shape[dim] == labels.shape[1]:
                value = value.narrow(dim, first, len(range(*window.indices(labels.shape[1]))))
        return value

    return {name: cut(value) for name, value in batch.items()}

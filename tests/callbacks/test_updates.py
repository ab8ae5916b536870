"""The last update that instruments are given: what was applied, no earlier and no longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from torch import Tensor, nn

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.instrument import Scalars
from lightning_hessian.measure.session import Session

MakeTrainer = Callable[..., Any]
Parts = dict[str, Tensor]


class Sees:
    """Keeps copies of the updates that sessions are given, by the step."""

    name = "sees"
    prefix = "sees"

    def __init__(self) -> None:
        self.found: list[Parts | None] = []
        self.held: list[weakref.ref[Tensor]] = []

    def check(self, model: nn.Module) -> None:
        pass

    def cost(self, session: Session) -> int:
        return 1

    def measure(self, session: Session, allowance: Allowance) -> Scalars:
        update = None if session.training is None else session.training.update
        self.found.append(None if update is None else {k: v.clone() for k, v in update.items()})
        self.held += [] if update is None else [weakref.ref(part) for part in update.values()]
        return Scalars({})


class Told(Regression):
    """Remembers what each batch that stepped has changed, and whether the callback kept copies."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make
        self.callback: Any = None
        self.changes: list[Parts] = []
        self.expected: list[Parts | None] = []
        self._told = 0
        self.kept: list[bool] = []
        self._start: Parts = {}

    def configure_optimizers(self) -> Any:
        return self.make(self)

    def now(self) -> Parts:
        return {name: part.detach().clone() for name, part in self.named_parameters()}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._start = self.now()

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # after the callbacks' hook
        self.kept.append(self.callback._update._before is not None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        change = {name: part - self._start[name] for name, part in self.now().items()}
        if any(part.any() for part in change.values()):
            self.changes.append(change)

    def on_validation_epoch_end(self) -> None:
        """The update that a measurement here has to have seen; None without a new one."""
        if not self.trainer.sanity_checking:
            self.expected.append(self.changes[-1] if len(self.changes) > self._told else None)
            self._told = len(self.changes)


class ByHand(Told):
    """Two optimizers in turn, each with the other's parameters switched off, every third batch."""

    def __init__(self, every: int = 1) -> None:
        super().__init__(lambda module: None)
        self.automatic_optimization = False
        self.every = every

    def configure_optimizers(self) -> Any:
        first, second = self.net[0], self.net[2]
        return [
            torch.optim.SGD(first.parameters(), lr=0.1),
            torch.optim.Adam(second.parameters(), lr=0.01),
        ]

    def hessian_loss(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if (batch_idx + 1) % self.every:
            return
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def _sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def _adamw(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def _lbfgs(module: Any) -> Any:
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


CASES: dict[str, tuple[Callable[[], Told], dict[str, Any]]] = {
    "SGD": (lambda: Told(_sgd), {}),
    "AdamW, clipped": (lambda: Told(_adamw), {"gradient_clip_val": 0.1}),
    "LBFGS": (lambda: Told(_lbfgs), {}),
    "accumulated, validation between": (
        lambda: Told(_adamw), {"accumulate_grad_batches": 3, "val_check_interval": 2},
    ),
    "twice an epoch": (lambda: Told(_sgd), {"val_check_interval": 0.5}),
    "batches counted on": (
        lambda: Told(_sgd), {"val_check_interval": 3, "check_val_every_n_epoch": None},
    ),
    "two optimizers by hand": (ByHand, {}),
    "by hand, every third batch": (lambda: ByHand(3), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_was_applied(make_trainer: MakeTrainer, name: str) -> None:
    make, arguments = CASES[name]
    sees, module = Sees(), make()
    module.callback = callback = small_callback(blocks=None, instruments=[sees])
    make_trainer(callback, max_epochs=3, **arguments).fit(module, train_loader(), val_loader())
    assert len(sees.found) == len(module.expected) > 1
    assert sum(found is not None for found in sees.found) > 1
    for number, (found, expected) in enumerate(zip(sees.found, module.expected, strict=True)):
        if name == "by hand, every third batch" and number == 0:
            continue  # nobody has seen yet how often it steps
        if expected is None:
            assert found is None
            continue
        assert found is not None
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    gc.collect()
    assert sees.held
    assert not [ref for ref in sees.held if ref() is not None]
    assert callback._update.parts is None


def test_parameters_are_copied_for_the_step_before_a_validation_only(
    make_trainer: MakeTrainer,
) -> None:
    for arguments, expected in (
        ({}, [0, 0, 0, 1] * 3),
        ({"val_check_interval": 0.5}, [0, 1, 0, 1] * 3),
        ({"check_val_every_n_epoch": 2}, [0] * 4 + [0, 0, 0, 1] + [0] * 4),
        ({"limit_val_batches": 0}, [0] * 12),
    ):
        module = Told(_sgd)
        module.callback = callback = small_callback(blocks=None)
        trainer = make_trainer(callback, max_epochs=3, **arguments)
        trainer.fit(module, train_loader(), val_loader())
        assert module.kept == [bool(one) for one in expected]


def test_frozen_parameters_are_no_part_of_it(make_trainer: MakeTrainer) -> None:
    sees = Sees()
    module = Told(lambda module: torch.optim.SGD(module.net[2].parameters(), lr=0.1))
    module.net[0].requires_grad_(False)
    module.callback = callback = small_callback(blocks=None, instruments=[sees])
    make_trainer(callback).fit(module, train_loader(), val_loader())
    (found,) = sees.found
    assert found is not None
    assert found.keys() == {"net.2.weight", "net.2.bias"}


def test_in_half_precision_the_difference_has_more_digits(make_trainer: MakeTrainer) -> None:
    sees, module = Sees(), Told(_sgd)
    module.callback = callback = small_callback(blocks=None, instruments=[sees])
    make_trainer(callback, precision="bf16-true").fit(module, train_loader(), val_loader())
    (found,) = sees.found
    assert found is not None
    assert {part.dtype for part in found.values()} == {torch.float32}
    assert any(part.any() for part in found.values())


def test_stability_meets_the_update(make_trainer: MakeTrainer) -> None:
    """What is predicted of the update is what the loss would do, as far as it is a quadratic."""
    module = Told(lambda module: torch.optim.SGD(module.parameters(), lr=0.003))
    module.callback = callback = small_callback(blocks=None, num_batches=10)
    make_trainer(callback, max_epochs=3).fit(module, train_loader(), val_loader())
    for row in callback.history:
        assert row["stability/actual_change"] == pytest.approx(
            row["stability/predicted_change"], rel=0.02
        )
    last = callback.records["stability"].scalars()
    assert module.expected[-1] is not None
    update = torch.cat([part.flatten() for part in module.expected[-1].values()])
    curvature = _curvature(module, update)
    assert last["update_curvature"] == pytest.approx(curvature, rel=1e-3)


def _curvature(module: Any, update: Tensor) -> float:
    """Returns u^T H u / u^T u of the mean loss over all training data, H dense in float64."""
    from callbacks.tiny_modules import NUM_TRAIN, samples
    from torch.func import functional_call, grad, jacfwd

    inputs, targets = (part.double() for part in samples(NUM_TRAIN, seed=1).tensors)
    net = module.net.double()
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    sizes = [part.numel() for part in net.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(net.named_parameters(), flat.split(sizes), strict=True)
        values = {name: part.view(like.shape) for (name, like), part in parts}
        return (functional_call(net, values, inputs) - targets).square().mean()

    hessian, direction = jacfwd(grad(loss))(flat), update.double()
    return float(direction @ hessian @ direction / (direction @ direction))

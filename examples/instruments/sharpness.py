"""An instrument of one's own: sharpness within a ball, as SAM has it, live beside a run.

Run it as ``python sharpness.py``; it takes seconds and needs no account.
"""

from dataclasses import dataclass

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import Absent, HessianSpectrumCallback, Record, Scalars, Session


@dataclass(frozen=True)
class Sharpness:
    """How much the loss rises by one ascent step to the edge of a ball: max L(w + e) - L(w).

    Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
    Generalization. ICLR 2021, equation 2: the maximum over ``|e| <= rho`` is where
    ``e = rho g / |g|``, to first order.

    Attributes:
        rho: Radius of the ball.
    """

    rho: float = 0.05
    name: str = "sharpness"
    prefix: str = "sharpness"

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for a radius that is not positive, before training."""
        if not self.rho > 0:
            raise ValueError(f"rho={self.rho!r} must be positive.")

    def cost(self, session: Session) -> int:
        """Return the cost in Hessian-vector products: a gradient and a loss are about one."""
        return 1

    def measure(self, session: Session, allowance: object) -> Record:
        """Return the rise of the loss."""
        gradient = session.gradient()
        norm = session.shard.norm(gradient)
        if norm == 0:
            return Absent(("The gradient is zero, so there is no direction of ascent.",))
        rise = session.loss_at(self.rho * gradient / norm) - session.loss
        return Scalars({"rise": rise, "gradient_norm": float(norm)})


class Regression(L.LightningModule):
    """Any module with a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        """Return the mean loss of the batch."""
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def validation_step(self, batch, batch_idx):
        """Log the validation loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        """Return the optimiser."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> list[dict[str, float]]:
    """Train for six epochs and return what was measured after each."""
    L.seed_everything(0)
    x = torch.randn(600, 10)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    train = DataLoader(TensorDataset(x[:500], y[:500]), batch_size=50, shuffle=True)
    val = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=100)
    hessian = HessianSpectrumCallback(
        num_eigenvalues=5, blocks=None, time_budget=None, instruments=[Sharpness()]
    )
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[hessian],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), train, val)
    for row in hessian.history:
        print(
            f"epoch {row['epoch']}: rise {row['sharpness/rise']:.4f}, "
            f"|g| {row['sharpness/gradient_norm']:.4f}, lambda_1 {row['lambda_1']:.3f}, "
            f"val_loss {row['val_loss']:.4f}"
        )
    return hessian.history


if __name__ == "__main__":
    main()

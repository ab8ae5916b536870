"""The callback on a LightningModule of your own: nothing in the module changes.

Run it with ``python examples/quickstart.py``; it takes a few seconds and needs no account.
"""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback


class Regression(L.LightningModule):
    """Any module with a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
        )

    def training_step(self, batch, batch_idx):
        """Return the mean loss of the batch."""
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.network(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        """Log what the statistics are correlated with."""
        x, y = batch
        self.log("val_loss", torch.nn.functional.mse_loss(self.network(x), y))

    def configure_optimizers(self):
        """Return the optimiser."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    """Train for eight epochs and print what was found."""
    L.seed_everything(0)
    x = torch.randn(600, 10)
    y = torch.sin(x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    train = DataLoader(TensorDataset(x[:500], y[:500]), batch_size=50, shuffle=True)
    val = DataLoader(TensorDataset(x[500:], y[500:]), batch_size=100)

    # The default, a fifth of the training time, would measure this tiny run at its end only.
    hessian = HessianSpectrumCallback(num_eigenvalues=20, time_budget=None)
    trainer = L.Trainer(
        max_epochs=8,
        accelerator="cpu",
        callbacks=[hessian],
        logger=CSVLogger("logs"),
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), train, val)

    keys = ("step", "val_loss", "d_ks", "s_hat", "lambda_1")
    for row in hessian.history:
        print({key: round(row[key], 4) for key in keys})
    for (statistic, monitor), found in hessian.correlations().items():
        print(f"{statistic} with {monitor}: r = {found.r:.2f} over {found.num_points} points")


if __name__ == "__main__":
    main()

"""Real images for the examples: MNIST where it is, scikit-learn's digits otherwise."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load_images(data_dir: Path | None, count: int) -> tuple[Tensor, Tensor, str]:
    """Return standardised images [count, 1, 8, 8], their labels [count], and the name of the set.

    MNIST is averaged to 8 x 8 (over 4 x 4 pixels, after two rows of padding), so that both sets
    suit the same small networks.

    Args:
        data_dir: Folder that holds ``MNIST/raw``; None for the digits.
        count: How many images, at most 1,797 of the digits.
    """
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, name = torch.tensor(digits.images[:count]), "scikit-learn's digits"
        labels = torch.tensor(digits.target[:count])
    else:
        raw = data_dir / "MNIST" / "raw"
        with gzip.open(raw / "train-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(16 + 784 * count), np.uint8, offset=16)
        with gzip.open(raw / "train-labels-idx1-ubyte.gz") as file:
            labels = torch.tensor(np.frombuffer(file.read(8 + count), np.uint8, offset=8).copy())
        padded = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
        images = torch.tensor(padded.reshape(-1, 8, 4, 8, 4).mean((2, 4)))
        name = "MNIST, averaged to 8 x 8"
    images = images.float().unsqueeze(1)
    return (images - images.mean()) / images.std(), labels.long(), name

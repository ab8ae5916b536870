"""Which operations can be linearised: products against torch's double backward, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian.operators.engines import autograd, linearize
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace

IMAGES, ROWS, SEQUENCES = (3, 4, 6, 6), (5, 8), (3, 6, 8)


def first(module: nn.Module):
    return lambda *inputs: module(*inputs)[0]


def squares(x: Tensor) -> Tensor:
    return x.T @ x + torch.eye(x.shape[1], dtype=x.dtype)


NORMS = {
    "layer norm": (nn.LayerNorm(8), ROWS),
    "layer norm of images": (nn.LayerNorm((4, 6, 6)), IMAGES),
    "RMS norm": (nn.RMSNorm(8), ROWS),
    "group norm": (nn.GroupNorm(2, 4), IMAGES),
    "group norm of rows": (nn.GroupNorm(4, 8, affine=False), ROWS),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), IMAGES),
    "local response norm": (nn.LocalResponseNorm(2), IMAGES),
    "batch norm": (nn.BatchNorm2d(4), IMAGES),
    "batch norm in training": (lambda x: F.batch_norm(x, None, None, training=True), IMAGES),
    "normalize": (F.normalize, ROWS),
    "std": (lambda x: x.std(-1), ROWS),
    "spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), ROWS),
}
SPATIAL = {
    "grouped convolution": (nn.Conv2d(4, 4, 3, groups=2, dilation=2), IMAGES),
    "transposed convolution": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), IMAGES),
    "1d convolution": (nn.Conv1d(6, 3, 2), SEQUENCES),
    "3d convolution": (nn.Conv3d(4, 3, 2), (2, 4, 3, 3, 3)),
    "mean pooling": (nn.AvgPool2d(2), IMAGES),
    "adaptive mean": (nn.AdaptiveAvgPool2d(4), IMAGES),
    "maxima": (nn.MaxPool2d(3, 2, 1), IMAGES),
    "adaptive maxima": (nn.AdaptiveMaxPool2d(4), IMAGES),
    "power pooling": (nn.LPPool2d(2, 2), IMAGES),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGES),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGES),
    "nearest": (nn.Upsample(scale_factor=2), IMAGES),
    "shuffled pixels": (nn.PixelShuffle(2), IMAGES),
    "unfold": (nn.Unfold(2), IMAGES),
    "reflected": (nn.ReflectionPad2d(1), IMAGES),
    "replicated": (nn.ReplicationPad2d(1), IMAGES),
    "circular": (nn.CircularPad2d(1), IMAGES),
}
POINTWISE = {
    name: (getattr(nn, name)(), ROWS)
    for name in (
        "GELU", "SiLU", "Mish", "SELU", "Softplus", "Hardswish", "PReLU", "GLU", "LogSigmoid",
        "Softsign", "CELU", "LeakyReLU", "Tanhshrink", "Softshrink", "ReLU6", "Sigmoid", "ELU",
    )
} | {
    "tanh GELU": (nn.GELU(approximate="tanh"), ROWS),
    "erf": (torch.erf, ROWS),
    "lgamma": (lambda x: torch.lgamma(x.abs() + 1), ROWS),
    "atan2": (lambda x: torch.atan2(x, x * x + 1), ROWS),
    "lerp": (lambda x: torch.lerp(x, x * 2, x.sigmoid()), ROWS),
}  # fmt: skip
OTHERS = {
    "softmax": (nn.Softmax(-1), ROWS),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), SEQUENCES),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), SEQUENCES),
    "recurrent": (first(nn.RNN(8, 8, batch_first=True).double()), SEQUENCES),
    "cumulative": (lambda x: x.cumsum(-1).cumprod(-1), ROWS),
    "sorted": (lambda x: x.sort(-1)[0] * x.topk(8)[0], ROWS),
    "median": (lambda x: x.median(-1)[0], ROWS),
    "log of a sum": (lambda x: x.logsumexp(-1), ROWS),
    "cosine": (lambda x: F.cosine_similarity(x, x.flip(0) ** 2), ROWS),
    "Fourier": (lambda x: torch.fft.rfft(x).abs(), ROWS),
    "singular values": (torch.linalg.svdvals, ROWS),
    "log determinant": (lambda x: torch.linalg.slogdet(squares(x))[1], ROWS),
    "Cholesky": (lambda x: torch.linalg.cholesky(squares(x)), ROWS),
    "scattered": (lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x), ROWS),
    "added by index": (lambda x: x.new_zeros(3, 8).index_add(0, torch.arange(5) % 3, x), ROWS),
}
OPERATIONS = NORMS | SPATIAL | POINTWISE | OTHERS


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_linearised_product_is_that_of_the_double_backward(name):
    torch.manual_seed(0)
    operation, shape = OPERATIONS[name]
    make = {2: nn.Linear, 3: nn.Linear, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    before = make(8, 8) if make is nn.Linear else make(4, 4, 1)
    module = nn.Module()
    module.before = before
    if isinstance(operation, nn.Module):
        module.operation = operation
    module.double().eval()

    def loss_fn(module, batch):
        found = operation(module.before(batch))
        return found.square().mean() + found.sin().mean()

    space = ParameterSpace.select(module)
    objective = Objective(module, loss_fn, [torch.randn(shape, dtype=torch.float64)], space)
    with objective.isolated():
        graph, line = (make(objective, 0) for make in (autograd, linearize))
        for _ in range(2):  # nothing may be left over from one call to the next
            tangents = space.split(torch.randn(space.size, dtype=torch.float64))
            expected, found = (space.flatten(product(tangents)) for product in (graph, line))
            assert float((found - expected).norm()) <= 1e-10 * float(expected.norm())
            assert float(expected.norm()) > 0

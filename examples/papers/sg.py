"""SG's tables, row by row: "On the Overlooked Structure of Stochastic Gradients" (NeurIPS 2023).

Digits are those printed. Table 2 repeats rows of tables 6, 8 and 10 and is not listed twice; the
rows of table 1 with MNIST and "Random" are those of table 4 with B = 100.
"""

from __future__ import annotations

import recipes
from rows import Gradients, Network, Printed, Row, Samples

MNIST = Samples("mnist")
CIFAR_10, CIFAR_100 = Samples("cifar-10"), Samples("cifar-100")

# A mini-batch of 300 images and more takes 5000 of them: minutes to hours on a CPU.
_GPU_FROM = 1000
_PLAIN = "Gradients are those of images as they are, not flipped or cropped."


def _network(model: str, data: Samples, training: str) -> Network:
    return Network(model, data, None if training == "Random" else recipes.of(data))


def _spectrum(d_ks: str, s: str | None = None) -> Printed:
    """Return a row of tables 6 to 11: the verdict is Yes where d_ks is below 0.0430."""
    return Printed(d_ks, verdict="Yes" if float(d_ks) < 0.043 else "No", s=s)


def _tests(d_ks: str, rate: str, p_value: str, gaussian: str, d_c: str = "0.0430") -> Printed:
    return Printed(d_ks, d_c, rate=rate, p_value=p_value, gaussian_rate=gaussian)


# Tables 1, 4 and 5: entries over dimensions and over iterations ----------------------------------

_TABLE_1 = [
    ("MNIST", "Random", "Dimension", _tests("0.0355", "76.6", "4.11e-4", "0.18")),
    ("MNIST", "Random", "Iteration", _tests("0.191", "0.0788", "0.321", "65.1")),
    ("MNIST", "Pretrain", "Dimension", _tests("0.0401", "60.6", "5.77e-4", "0.24")),
    ("MNIST", "Pretrain", "Iteration", _tests("0.179", "0.052", "0.306", "62.0")),
    ("CIFAR-10", "Random", "Dimension", _tests("0.0330", "81.8", "1.03e-3", "0.3")),
    ("CIFAR-10", "Random", "Iteration", _tests("0.574", "0", "0.337", "66.8")),
    ("CIFAR-10", "Pretrain", "Dimension", _tests("0.0381", "69.2", "4.01e-5", "0")),
    ("CIFAR-10", "Pretrain", "Iteration", _tests("0.654", "0", "0.275", "56.6")),
]
_TABLE_4 = {
    "Iteration": {
        1: _tests("0.428", "0.067", "0.047", "12.6"),
        3: _tests("0.385", "0.17", "0.089", "21.5"),
        10: _tests("0.267", "0.25", "0.173", "28.5"),
        30: _tests("0.249", "0.16", "0.240", "50.9"),
        100: _tests("0.191", "0.079", "0.321", "65.1"),
        300: _tests("0.119", "0.033", "0.382", "74.5"),
        1000: _tests("0.120", "0.041", "0.388", "75.5"),
    },
    "Dimension": {
        1: _tests("0.0306", "90.6", "4.51e-5", "0"),
        3: _tests("0.0358", "74.5", "9.07e-5", "0.02"),
        10: _tests("0.0392", "65.3", "1.78e-4", "0"),
        30: _tests("0.0379", "68.9", "2.29e-4", "0.14"),
        100: _tests("0.0355", "76.6", "4.11e-4", "0.18"),
        300: _tests("0.0269", "97.5", "1.21e-3", "0.48"),
        1000: _tests("0.0309", "90.6", "1.43e-4", "0"),
    },
}
_TABLE_5 = [
    ("CIFAR-10", "Random", "Dimension", ("0.0924", "54.3", "1.73e-2", "6.4")),
    ("CIFAR-10", "Random", "Iteration", ("0.141", "1.32", "0.495", "93.4")),
    ("CIFAR-10", "Pretrain", "Dimension", ("0.0717", "82.6", "1.1e-2", "3.2")),
    ("CIFAR-10", "Pretrain", "Iteration", ("0.140", "1.38", "0.497", "93.5")),
    ("CIFAR-100", "Random", "Dimension", ("0.0631", "92.4", "8.55e-3", "3")),
    ("CIFAR-100", "Random", "Iteration", ("0.141", "1.36", "0.496", "93.2")),
    ("CIFAR-100", "Pretrain", "Dimension", ("0.0637", "88.5", "8.11e-3", "3.4")),
    ("CIFAR-100", "Pretrain", "Iteration", ("0.140", "1.37", "0.496", "93.1")),
]


def _entries() -> list[Row]:
    sets = {"MNIST": MNIST, "CIFAR-10": CIFAR_10, "CIFAR-100": CIFAR_100}
    rows = []
    for name, training, kind, printed in _TABLE_1:
        rows.append(
            Row(f"sg-1-{_slug(name)}-{_slug(training)}-{_slug(kind)}", "1",
                f"{name} {training} {kind}", _network("lenet", sets[name], training),
                Gradients(100, kind.lower()), printed, note=_PLAIN * name.startswith("CIFAR"))
        )  # fmt: skip
    for kind, by_size in _TABLE_4.items():
        for size, printed in by_size.items():
            rows.append(
                Row(f"sg-4-{_slug(kind)}-b{size}", "4", f"{kind} Random B={size}",
                    Network("lenet", MNIST), Gradients(size, kind.lower()), printed,
                    gpu=size >= _GPU_FROM)
            )  # fmt: skip
    for name, training, kind, digits in _TABLE_5:
        rows.append(
            Row(f"sg-5-{_slug(name)}-{_slug(training)}-{_slug(kind)}", "5",
                f"{name} ResNet18 {training} {kind}", _network("resnet18", sets[name], training),
                Gradients(100, kind.lower(), count=200, k=200), _tests(*digits, d_c="0.0962"),
                gpu=True)
        )  # fmt: skip
    return rows


# Tables 3, 6 and 7: LeNet on MNIST ---------------------------------------------------------------

_TABLE_3 = [
    ("LeNet", "Pretrain", 1, _spectrum("0.0205", "5.111")),
    ("LeNet", "Random", 1, _spectrum("0.0221", "2.232")),
    ("FCN", "Pretrain", 10, _spectrum("0.0219", "1.668")),
    ("FCN", "Random", 10, _spectrum("0.0231", "1.668")),
]
_SECOND_MOMENT_6 = {
    "Pretrain": {
        1: _spectrum("0.0206", "1.302"),
        10: _spectrum("0.0244", "1.313"),
        100: _spectrum("0.0171", "1.390"),
        1000: _spectrum("0.0173", "1.314"),
        10000: _spectrum("0.0204", "1.290"),
        60000: _spectrum("0.106", "0.206"),
    },
    "Random": {
        1: _spectrum("0.0220", "1.428"),
        10: _spectrum("0.0223", "1.334"),
        100: _spectrum("0.0228", "1.313"),
        1000: _spectrum("0.0198", "1.423"),
        10000: _spectrum("0.0213", "1.284"),
        60000: _spectrum("0.203", "0.271"),
    },
}
_COVARIANCE_7 = {
    "Random": {
        1: _spectrum("0.0226", "1.425"),
        10: _spectrum("0.0227", "1.331"),
        100: _spectrum("0.0230", "1.311"),
        1000: _spectrum("0.0200", "1.423"),
        10000: _spectrum("0.0287", "1.320"),
    },
    "Pretrain": {
        1: _spectrum("0.0206", "1.299"),
        10: _spectrum("0.0247", "1.310"),
        100: _spectrum("0.0171", "1.386"),
        1000: _spectrum("0.0174", "1.312"),
        10000: _spectrum("0.0223", "1.331"),
    },
}
_LABELS_7 = {
    "noise-40": ("Label Noise 40%", _spectrum("0.0289", "1.453")),
    "noise-80": ("Label Noise 80%", _spectrum("0.0138", "11.442")),
    "shuffled": ("Random Label", _spectrum("0.0129", "1.374")),
}
_CLIPPED_7 = {1.0: _spectrum("0.0226", "1.323"), 0.1: _spectrum("0.0261", "1.343")}


def _lenet_on_mnist() -> list[Row]:
    rows = []
    for model, training, size, printed in _TABLE_3:
        name, mode = ("lenet", "eval") if model == "LeNet" else ("fcn-2x70-bn", "train")
        rows.append(
            Row(f"sg-3-{model.lower()}-{_slug(training)}", "3", f"MNIST {model} {training}",
                _network(name, MNIST, training), Gradients(size, "eigengaps", mode=mode), printed,
                note=f"B is not given: {size}, as in the rows of the spectra that it goes with.")
        )  # fmt: skip
    tables = (("6", "second moment", _SECOND_MOMENT_6), ("7", "covariance", _COVARIANCE_7))
    for table, statistic, by_training in tables:
        for training, by_size in by_training.items():
            for size, printed in by_size.items():
                rows.append(
                    Row(f"sg-{table}-{_slug(training)}-b{size}", table,
                        f"MNIST LeNet {training} B={size}", _network("lenet", MNIST, training),
                        Gradients(size, statistic), printed, gpu=size >= _GPU_FROM)
                )  # fmt: skip
    for kind, (label, printed) in _LABELS_7.items():
        network = _network("lenet", Samples("mnist", labels=kind), "Pretrain")
        rows.append(
            Row(f"sg-7-{kind}", "7", f"MNIST LeNet Pretrain {label}", network,
                Gradients(1, "covariance"), printed,
                note="Gradients are those of the corrupted labels."
                + " The paper prints a slope of 11.442; 1.442 is likelier." * (kind == "noise-80"))
        )  # fmt: skip
    for norm, printed in _CLIPPED_7.items():
        rows.append(
            Row(f"sg-7-clip{norm:g}", "7", f"MNIST LeNet Pretrain GradClip={norm:g}",
                _network("lenet", MNIST, "Pretrain"), Gradients(1, "covariance", clip_norm=norm),
                printed)
        )  # fmt: skip
    return rows


# Tables 8 and 9: fully connected and linear networks ---------------------------------------------

_FCN_8 = [
    ("fcn-2x70-bn", "Pretrain", "2Layer-FCN Pretrain", "real", _spectrum("0.0415", "0.866")),
    ("fcn-2x70-bn", "Random", "2Layer-FCN Random", "real", _spectrum("0.0418", "0.864")),
    ("fcn-2x70-bn", "Random", "2Layer-FCN Random Noise", "gaussian", _spectrum("0.0427", "0.862")),
    ("fcn-2x30-bn", "Pretrain", "2Layer-FCN Pretrain Width=30", "real",
     _spectrum("0.0425", "0.869")),
    ("fcn-2x10-bn", "Pretrain", "2Layer-FCN Pretrain Width=10", "real", _spectrum("0.0486")),
    ("fcn-2x30-bn", "Random", "2Layer-FCN Random Width=30", "real", _spectrum("0.0488")),
    ("fcn-2x10-bn", "Random", "2Layer-FCN Random Width=10", "real", _spectrum("0.0491")),
    ("fcn-1x70-bn", "Random", "1Layer-FCN Random", "real", _spectrum("0.0384", "1.357")),
    ("fcn-1x70-bn", "Pretrain", "1Layer-FCN Pretrain", "real", _spectrum("0.0384", "1.355")),
]  # fmt: skip
_LNN_9 = [
    ("lnn-4x70", "4Layer-LNN", _spectrum("0.0445", "1.629")),
    ("lnn-4x70-bn", "4Layer-LNN BatchNorm", _spectrum("0.0268", "0.955")),
    ("lnn-4x70-relu", "4Layer-LNN ReLU", _spectrum("0.0154", "1.074")),
]


def _dense() -> list[Row]:
    rows = []
    measure = Gradients(10, "second moment", mode="train")
    note = (
        "Gradients are those of training mode, where batch normalisation goes by the mini-batch: "
        "the paper does not say, but has B = 10 here, the default being 1."
    )
    for model, training, label, inputs, printed in _FCN_8:
        # The first row of width 70 stands for "Width=70" too, which the paper prints again.
        network = _network(model, Samples("mnist", inputs=inputs), training)
        rows.append(
            Row(f"sg-8-{_slug(label)}", "8", f"MNIST {label}", network, measure, printed,
                note=note)
        )  # fmt: skip
    for model, label, printed in _LNN_9:
        rows.append(
            Row(f"sg-9-{_slug(label)}", "9", f"MNIST {label} Pretrain",
                _network(model, MNIST, "Pretrain"), measure, printed,
                note=note + " The width is not given: 70, as of the FCN.")
        )  # fmt: skip
    return rows


# Tables 10 and 11: LeNet on CIFAR ----------------------------------------------------------------


def _lenet_on_cifar() -> list[Row]:
    single, hundred = Gradients(1, "covariance"), Gradients(100, "covariance")
    found: list[tuple[str, str, Samples, str, Gradients, Printed, str]] = [
        ("10", "CIFAR-10 LeNet Pretrain", CIFAR_10, "Pretrain", single,
         _spectrum("0.0201", "1.257"), ""),
        ("10", "CIFAR-10 LeNet Random", CIFAR_10, "Random", single,
         _spectrum("0.0214", "1.300"), ""),
        ("10", "CIFAR-10 LeNet Pretrain GradClip=0.1", CIFAR_10, "Pretrain",
         Gradients(1, "covariance", clip_norm=0.1), _spectrum("0.0244", "1.348"), ""),
        ("10", "CIFAR-10 LeNet Random SGD", CIFAR_10, "Random", hundred,
         _spectrum("0.00818", "1.305"), ""),
        ("10", "CIFAR-10 LeNet Random Weight Decay", CIFAR_10, "Random",
         Gradients(100, "covariance", weight_decay=5e-4), _spectrum("0.0107", "1.300"),
         "At fixed parameters weight decay adds one vector to all gradients, and their covariance "
         "cannot change; what the paper did besides is not said."),
        ("10", "CIFAR-10 LeNet Random Momentum", CIFAR_10, "Random",
         Gradients(100, "covariance", momentum=0.9), _spectrum("0.00806", "1.262"),
         "The buffers of SGD with momentum 0.9 at fixed parameters; the paper does not say how."),
        ("10", "CIFAR-10 LeNet Random Adam", CIFAR_10, "Random",
         Gradients(100, "covariance", preconditioner="adam"), _spectrum("0.0634"),
         "Gradients over sqrt(v), v the mean of their squares; the paper does not say how."),
        ("11", "CIFAR-100 LeNet Pretrain", CIFAR_100, "Pretrain", single,
         _spectrum("0.0287", "1.276"), ""),
        ("11", "CIFAR-100 LeNet Random", CIFAR_100, "Random", single,
         _spectrum("0.0307", "1.229"), ""),
    ]  # fmt: skip
    return [
        Row(f"sg-{table}-{_slug(label)}", table, label, _network("lenet", data, training), measure,
            printed, note=f"{_PLAIN} {note}".strip())
        for table, label, data, training, measure, printed, note in found
    ]  # fmt: skip


def _slug(text: str) -> str:
    for old, new in ((" ", "-"), ("=", ""), ("%", "")):
        text = text.lower().replace(old, new)
    return text


ROWS = [*_entries(), *_lenet_on_mnist(), *_dense(), *_lenet_on_cifar()]

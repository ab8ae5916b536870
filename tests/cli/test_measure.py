"""`lightning-hessian measure` on checkpoints of real training runs."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import trained
from support.gauss_newton_oracle import dense_gauss_newton, softmax_curvature
from torch.func import functional_call

from lightning_hessian import hessian_spectrum
from lightning_hessian.cli.main import main
from lightning_hessian.histories.load import load_runs
from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.results import load_spectrum, save_spectrum

NAMES = ["--module", "support.trained:Net", "--data", "support.trained:Data"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the checkpoints of three epochs."""
    folder = tmp_path_factory.mktemp("run")
    L.seed_everything(0, verbose=False)
    keep = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, callbacks=[keep],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    ).fit(trained.Net(width=4), datamodule=trained.Data())  # fmt: skip
    return folder


def dense_eigenvalues(path: Path, names: tuple[str, ...] | None = None) -> np.ndarray:
    """Eigenvalues, descending, of the Hessian of the loss on all points, by torch's jacobians."""
    state = torch.load(path, weights_only=True)["state_dict"]
    module, data = trained.Net(width=4), trained.Data()
    module.load_state_dict(state)
    data.setup("fit")
    inputs, labels = data.points[:]
    chosen = {n: t for n, t in state.items() if names is None or n in names}
    shapes = [t.shape for t in chosen.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        given = {n: p.view(s) for n, p, s in zip(chosen, parts, shapes, strict=True)}
        output = functional_call(module, {**state, **given}, (inputs,))
        return torch.nn.functional.cross_entropy(output, labels)

    point = torch.cat([t.reshape(-1) for t in chosen.values()])
    return torch.linalg.eigvalsh(torch.func.jacfwd(torch.func.grad(loss))(point)).flip(0).numpy()


def test_every_checkpoint_has_its_spectrum_and_its_row(run, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["measure", str(run), *NAMES, "--num-eigenvalues", "6", "--tol", "1e-8",
                 "--out", str(out)]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    for epoch, row in enumerate(rows):
        path = run / f"epoch={epoch}.ckpt"
        expected = dense_eigenvalues(path)
        spectrum = load_spectrum(out / "spectra" / f"epoch={epoch}.npz")
        np.testing.assert_allclose(spectrum.eigenvalues, expected[:6], rtol=1e-7)
        assert float(row["hessian/lambda_1"]) == pytest.approx(expected[0], rel=1e-7)
        saved = torch.load(path, weights_only=True)["callbacks"]
        (state,) = [s for n, s in saved.items() if n.startswith("ModelCheckpoint")]
        assert float(row["val_loss"]) == pytest.approx(float(state["current_score"]), rel=1e-6)
        assert f"epoch={epoch}.ckpt ({epoch + 1} of 3)" in printed
    # What is written is what the report and the figures read.
    (read,) = load_runs(out, cache=False).runs
    assert read.series("hessian/lambda_1").tolist() == [float(r["hessian/lambda_1"]) for r in rows]
    assert read.config["width"] == 4
    steps, spectra = zip(*read_spectra(out)["hessian"], strict=True)
    assert steps == (3, 6, 9)
    np.testing.assert_allclose(spectra[2].eigenvalues, spectrum.eigenvalues, rtol=1e-6)


def test_the_gauss_newton_matrix_is_measured_into_a_folder_of_its_own(run, tmp_path, capsys):
    path = run / "epoch=2.ckpt"
    arguments = ["measure", str(path), *NAMES, "--num-eigenvalues", "4", "--tol", "1e-8",
                 "--out", str(tmp_path)]  # fmt: skip
    assert main([*arguments, "--matrix", "gauss_newton"]) == 0
    module, data = trained.Net(width=4), trained.Data()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    data.setup("fit")
    inputs, labels = data.points[:]
    weights = torch.ones(len(labels)).double() / len(labels)
    classes = module(inputs).shape[-1]
    expected = dense_gauss_newton(
        module, inputs, lambda z: softmax_curvature(z.view(-1, classes), weights)
    )
    spectrum = load_spectrum(tmp_path / "spectra" / "epoch=2.npz")
    assert spectrum.matrix_kind == "gauss_newton"
    values = torch.linalg.eigvalsh(expected).flip(0)[:4]
    np.testing.assert_allclose(spectrum.eigenvalues, values, rtol=1e-5)
    with open(tmp_path / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["hessian/gauss_newton"]) == 1
    capsys.readouterr()
    assert main(arguments) == 2
    assert "matrix 'gauss_newton' there, 'hessian' here" in capsys.readouterr().err


def test_what_is_done_is_not_done_again(run, tmp_path, capsys):
    copies = tmp_path / "checkpoints"
    shutil.copytree(run, copies)
    arguments = ["measure", str(copies), *NAMES, "--num-eigenvalues", "3", "--out",
                 str(tmp_path / "out")]  # fmt: skip
    assert main([*arguments[:1], str(copies / "epoch=0.ckpt"), *arguments[2:]]) == 0
    file = tmp_path / "out" / "spectra" / "epoch=0.npz"
    before = file.stat().st_mtime_ns
    assert main(arguments) == 0
    assert "epoch=0.ckpt (1 of 3): measured before" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    assert len(list(file.parent.glob("*.npz"))) == 3
    assert main([*arguments, "--again"]) == 0
    assert file.stat().st_mtime_ns > before
    changed = copies / "epoch=0.ckpt"
    shutil.copyfile(copies / "epoch=1.ckpt", changed)  # trained anew under the same name
    step = torch.load(copies / "epoch=1.ckpt", weights_only=True)
    torch.save({**step, "global_step": 100}, changed)
    assert main(arguments) == 0
    expected = dense_eigenvalues(copies / "epoch=1.ckpt")[:3]
    np.testing.assert_allclose(load_spectrum(file).eigenvalues, expected, rtol=1e-3)


def test_a_measurement_that_was_stopped_goes_on_where_it_was(run, tmp_path, capsys):
    def arguments(out: str) -> list[str]:
        return ["measure", str(run / "epoch=2.ckpt"), *NAMES, "--num-eigenvalues", "4", "--tol",
                "1e-9", "--loss", "support.trained:interrupted", "--hvp", "recompute",
                "--trace-probes", "0", "--out", str(tmp_path / out)]  # fmt: skip

    assert main(arguments("whole")) == 0
    whole = load_spectrum(tmp_path / "whole" / "spectra" / "epoch=2.npz")
    trained.STOP_AFTER[:] = [3 * 6 + 10]  # in the middle: three batches to a product
    try:
        with pytest.raises(SystemExit) as stopped:
            main(arguments("parts"))
    finally:
        trained.STOP_AFTER.clear()
    assert stopped.value.code == 130
    assert "run the same command again" in capsys.readouterr().err
    state = tmp_path / "parts" / "spectra" / "epoch=2.lanczos"
    assert state.exists()
    assert main(arguments("parts")) == 0
    parts = load_spectrum(state.with_suffix(".npz"))
    assert not state.exists()
    np.testing.assert_array_equal(parts.eigenvalues, whole.eigenvalues)
    assert parts.num_hvps == whole.num_hvps


def test_selection_loss_and_data_by_name(run, tmp_path):
    for data, extra in (
        ("support.trained:batches", []),
        (str(Path(trained.__file__)) + ":batches", ["--parameters", "head.*"]),
    ):
        out = tmp_path / str(len(extra))
        code = main(["measure", str(run / "epoch=1.ckpt"), *NAMES[:2], "--data", data,
                     "--num-eigenvalues", "4", "--out", str(out), *extra])  # fmt: skip
        assert code == 0
        names = ("head.weight", "head.bias") if extra else None
        expected = dense_eigenvalues(run / "epoch=1.ckpt", names)[:4]
        found = load_spectrum(out / "spectra" / "epoch=1.npz")
        np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-3)
    named = ["--loss", "support.trained:squared", "--num-eigenvalues", "1"]
    code = main(["measure", str(run / "epoch=1.ckpt"), *NAMES, *named, "--out",
                 str(tmp_path / "loss")])  # fmt: skip
    assert code == 0
    module = trained.Net.load_from_checkpoint(run / "epoch=1.ckpt")
    expected = hessian_spectrum(module, trained.squared, trained.batches(), num_eigenvalues=1)
    found = load_spectrum(tmp_path / "loss" / "spectra" / "epoch=1.npz")
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-6)
    assert found.loss == pytest.approx(expected.loss)


def test_the_metrics_of_a_validation(run, tmp_path):
    path = tmp_path / "plain.ckpt"
    content = torch.load(run / "epoch=1.ckpt", weights_only=True)
    torch.save({**content, "callbacks": {}}, path)
    assert main(["measure", str(path), *NAMES, "--num-eigenvalues", "2", "--validate", "--out",
                 str(tmp_path / "out")]) == 0  # fmt: skip
    with open(tmp_path / "out" / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    module, (inputs, labels) = trained.Net.load_from_checkpoint(path), _all_points()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(module(inputs), labels)
    assert float(row["val_loss"]) == pytest.approx(float(expected), rel=1e-6)


def _all_points() -> tuple[torch.Tensor, torch.Tensor]:
    data = trained.Data()
    data.setup("fit")
    return data.points[:]


class Anything:
    """An object that a checkpoint can hold only by pickling its class."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--module": "support.trained:Nothing"}, "has no 'Nothing'; it defines"),
        ({"--module": "support.trained:not_a_module"}, "is no LightningModule"),
        ({"--module": "no.such:Net"}, "There is no module 'no.such'"),
        ({"--module": "Net"}, "is not PKG:NAME"),
        ({"--module": "gone.py:Net"}, "There is no file gone.py"),
        ({"--data": None}, "has no train_dataloader of its own"),
        ({"--data-arg": "count"}, "is not NAME=VALUE"),
        ({"--num-eigenvalues": "500"}, "Ask for 1 to 26"),
        ({"--module-arg": "width=7"}, "size mismatch"),
        ({"--module-arg": "depth=7"}, "--module-arg depth: support.trained:Net takes width"),
        ({"--protocol": "quickly"}, "--protocol: 'quickly' cannot be used"),
    ],
)
def test_a_wrong_argument_ends_in_a_remedy(run, tmp_path, capsys, change, message):
    given = dict(zip(NAMES[::2], NAMES[1::2], strict=True)) | change
    arguments = [text for pair in given.items() if pair[1] is not None for text in pair]
    out = ["--out", str(tmp_path / "out")]
    assert main(["measure", str(run / "epoch=0.ckpt"), *arguments, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) <= 2


def test_a_wrong_checkpoint_ends_in_a_remedy(run, tmp_path, capsys):
    content = torch.load(run / "epoch=0.ckpt", weights_only=True)
    damaged, unsafe, other = (tmp_path / name for name in ("damaged", "unsafe", "other"))
    damaged.write_bytes((run / "epoch=0.ckpt").read_bytes()[:500])
    torch.save({**content, "thing": Anything()}, unsafe)
    torch.save({"weights": content["state_dict"]}, other)
    for path, message in (
        (tmp_path / "gone.ckpt", "no such checkpoint"),
        (tmp_path, "holds no *.ckpt"),
        (damaged, "is damaged"),
        (unsafe, "give --trust"),
        (other, "no state_dict"),
    ):
        out = ["--out", str(tmp_path / "out")]
        assert main(["measure", str(path), *NAMES, "--num-eigenvalues", "2", *out]) == 2
        assert message in capsys.readouterr().err
    assert main(["measure", str(unsafe), *NAMES, "--num-eigenvalues", "2", "--trust", *out]) == 0


def test_other_arguments_and_other_runs_need_another_folder(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--num-eigenvalues"]
    first = ["measure", str(run / "epoch=0.ckpt"), *NAMES, *out]
    assert main([*first, "2"]) == 0
    assert main([*first, "3"]) == 2
    assert "num_eigenvalues 2 there, 3 here" in capsys.readouterr().err
    twin = tmp_path / "twin.ckpt"
    shutil.copyfile(run / "epoch=0.ckpt", twin)
    assert main(["measure", str(twin), *NAMES, *out, "2"]) == 2
    assert "both of step 3" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_measured_does_not_stop_the_others(run, tmp_path, capsys):
    content = torch.load(run / "epoch=0.ckpt", weights_only=True)
    state = {name: torch.full_like(t, torch.nan) for name, t in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "a.ckpt")
    shutil.copyfile(run / "epoch=1.ckpt", tmp_path / "b.ckpt")
    arguments = ["--num-eigenvalues", "2", "--out", str(tmp_path / "out")]
    assert main(["measure", str(tmp_path), *NAMES, *arguments]) == 1
    assert "1 of 2 could not be measured" in capsys.readouterr().err
    assert (tmp_path / "out" / "spectra" / "b.npz").exists()


def test_a_spectrum_in_a_file_is_the_spectrum(tmp_path):
    module = trained.Net()
    spectrum = hessian_spectrum(
        module, None, trained.batches(), num_eigenvalues=3, return_eigenvectors=True, density=True
    )
    save_spectrum(spectrum, tmp_path / "s.npz")
    read = load_spectrum(tmp_path / "s.npz")
    for name, value in vars(spectrum).items():
        found = getattr(read, name)
        if name == "density":
            np.testing.assert_array_equal(found.nodes, value.nodes)
            np.testing.assert_array_equal(found.weights, value.weights)
            assert found.size == value.size
        elif name in ("eigenvalues", "residuals", "converged", "eigenvectors"):
            np.testing.assert_array_equal(found, value)
        else:
            assert found == value
    (tmp_path / "s.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="damaged"):
        load_spectrum(tmp_path / "s.npz")

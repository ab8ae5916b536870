"""Spectra as texts: what goes in comes out, and what is damaged says so."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from lightning_hessian.histories.spectra import read_spectra
from lightning_hessian.tracking.spectra import decode_spectrum, encode_spectrum

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_round_trip(count: int) -> None:
    values = np.sort(RNG.normal(size=count) * 10.0 ** RNG.uniform(-9, 9, count))[::-1]
    residuals = np.abs(RNG.normal(size=count))
    converged = RNG.random(count) < 0.7
    found = decode_spectrum(encode_spectrum(values, residuals, converged))
    np.testing.assert_array_equal(found.eigenvalues, values.astype(np.float32))
    assert found.residuals is not None
    np.testing.assert_array_equal(found.residuals, residuals.astype(np.float32))
    np.testing.assert_array_equal(found.converged, converged)
    bare = decode_spectrum(encode_spectrum(values))
    assert bare.residuals is None
    assert bare.converged.all()


def test_the_layout_is_the_documented_one() -> None:
    """Read here with struct alone, as a reader in another language would."""
    data = base64.b64decode(encode_spectrum([4.0, 2.0, -1.0], [0.5, 0.25, 1.0], [1, 0, 1]))
    assert struct.unpack("<2sBBI3f3fB", data) == (
        b"LH", 1, 1, 3, 4.0, 2.0, -1.0, 0.5, 0.25, 1.0, 0b10100000,
    )  # fmt: skip


def test_a_thousand_eigenvalues_are_eleven_kilobytes() -> None:
    values = np.ones(1000)
    assert len(encode_spectrum(values, values, values > 0)) < 11_000


def test_the_leading_ones_end_at_the_first_that_is_not_usable() -> None:
    found = decode_spectrum(encode_spectrum([5, 4, 3, -1], None, [True, True, False, True]))
    np.testing.assert_array_equal(found.leading, [5, 4])
    np.testing.assert_array_equal(decode_spectrum(encode_spectrum([5, 4])).leading, [5, 4])


@pytest.mark.parametrize(
    "text", ["", "no base64!", "AAAA", base64.b64encode(b"LH\x02\x00" + bytes(4))]
)
def test_what_is_no_spectrum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="this is no spectrum"):
        decode_spectrum(text)


def test_a_text_that_was_cut_is_refused() -> None:
    data = base64.b64decode(encode_spectrum(np.arange(10.0)))
    with pytest.raises(ValueError, match="cut short"):
        decode_spectrum(base64.b64encode(data[:-5]).decode())


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 eigenvalues need as many"):
        encode_spectrum([1.0, 2.0], [1.0])


def test_files_are_read_by_step_and_the_last_of_a_step_wins(tmp_path: Path) -> None:
    lines = [
        json.dumps({"step": step, "spectra/hessian": encode_spectrum([value])})
        for step, value in ((5, 1.0), (9, 2.0), (5, 3.0))
    ]
    (tmp_path / "spectra_hessian.jsonl").write_text("\n".join(lines) + "\n")
    for path in (tmp_path, tmp_path / "spectra_hessian.jsonl"):
        found = read_spectra(path)["hessian"]
        assert [(step, spectrum.eigenvalues.tolist()) for step, spectrum in found] == [
            (5, [3.0]), (9, [2.0]),
        ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_spectra(tmp_path / "nowhere")

"""What comes from outside is shown as text: by HTML, Markdown and CSV as others read them."""

from __future__ import annotations

import csv
import io
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lightning_hessian import correlation_report, write_report
from lightning_hessian.cli.main import main
from lightning_hessian.histories.run_table import RunRecord, RunTable
from lightning_hessian.reports.compose import compose
from lightning_hessian.reports.document import (
    Bullets,
    Document,
    Heading,
    Table,
    Text,
    bold,
    code,
    to_html,
    to_markdown,
)
from lightning_hessian.reports.media import MOST_BYTES, figures_of, read_png
from lightning_hessian.results.escaping import csv_cell, visible

HOSTILE = [
    "` ``<img src=x onerror=alert(1)>```",
    "``` <script>alert(1)</script>",
    "<script>alert(1)</script>",
    "a|b|<b>c</b>|",
    "[click](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "![x](http://evil.example/pixel.png)",
    "<javascript:alert(1)>",
    "<http://evil.example>",
    "https://evil.example/a?b=c www.evil.example me@evil.example",
    "[ref]: http://evil.example 'x'",
    "**bold** __bold__ _it_ ~~no~~ $x^2$",
    "**unequal `code",
    "# heading",
    "- item",
    "1. item",
    "---",
    "> quote",
    "&lt;b&gt; &#60;b&#62;",
    "a\n\n<b>b</b>\n\n# c",
    "\\` \\<b> \\\\`<b>`",
    "\ue000bold\ue001 \ue002<b>code</b>\ue003 \ue000",
    "\x1b[2J\x00\u202egnp.exe",
    "lone \ud800 surrogate",
    "<!-- x --> <![CDATA[ x ]]>",
    "</td></tr></table><h1>out</h1>",
    '" onmouseover="alert(1)',
]
OURS = {"h1", "h2", "p", "strong", "code", "em", "ul", "li", "img",
        "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip


class Page(HTMLParser):
    """Collects the tags, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.cells:
            self.cells[-1] += data


def rendered(markdown: str, renderer: str) -> str:
    """Returns HTML as libraries that others wrote make it."""
    if renderer == "python-markdown":
        return pytest.importorskip("markdown").markdown(markdown, extensions=["tables"])
    preset, options = {
        "gfm": ("gfm-like", {"linkify": False}),
        "commonmark with html": ("commonmark", {"html": True}),
    }[renderer]
    found = pytest.importorskip("markdown_it").MarkdownIt(preset, options).enable("table")
    return found.render(markdown)


def everywhere(name: str) -> Document:
    """A document that shows a name in every place where one can stand."""
    return Document(
        f"Which goes with {name}?",
        (
            Heading(f"{name}: over the run"),
            Text(name),
            Text(f"{bold(code(name))} and {code(name)} with {name}."),
            Text(name, muted=True),
            Bullets((name, f"{name}: left out")),
            Table((name, name), ((name, code(name)), (code(name), name))),
        ),
    )


@pytest.mark.parametrize("renderer", ["python-markdown", "gfm", "commonmark with html"])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_becomes_markup_in_markdown(name, renderer):
    harmless, page = (
        Page(rendered(to_markdown(everywhere(text)), renderer)) for text in ("harmless", name)
    )
    without_code = [tag for tag in page.tags if tag != "code"]
    assert without_code == [tag for tag in harmless.tags if tag != "code"]
    assert page.attributes == harmless.attributes
    expected = " ".join(visible(name).split())
    assert [" ".join(cell.split()) for cell in page.cells] == [expected] * 4


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_becomes_markup_in_html(name):
    harmless, page = (Page(to_html(everywhere(text))) for text in ("harmless", name))
    stripped = [tag for tag in page.tags if tag not in ("strong", "code")]
    assert stripped == [tag for tag in harmless.tags if tag not in ("strong", "code")]
    assert page.attributes == harmless.attributes


@pytest.mark.parametrize("name", HOSTILE)
def test_a_whole_report_survives_any_name(name, tmp_path):
    """Names, keys, config keys and groups of a run, all at once, and the files can be read."""
    rng = np.random.default_rng(0)
    runs = tuple(
        RunRecord(f"{name}{k}", f"{name}{k}", name, "csv", {name or "g": f"{name}{k % 2}"},
                  np.arange(9.0), {name + "m": rng.normal(size=9), name: rng.normal(size=9)},
                  (f"{name} is broken",))
        for k in range(4)
    )  # fmt: skip
    pattern = [key for key in runs[0].columns if key != name + "m"]
    report = correlation_report(
        RunTable(runs, (name,)), monitor=name + "m", statistics=_literal(pattern), group=name
    )
    write_report(report, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "img", "iframe", "a", "b", "h3"} & set(page.tags)
    for renderer in ("python-markdown", "gfm", "commonmark with html"):
        tags = Page(rendered((tmp_path / "report.md").read_text(), renderer))
        assert set(tags.tags) <= OURS | {"th", "td"}
        assert all(value.startswith("figures/") for key, value in tags.attributes if key == "src")
        assert not {"href", "onerror", "onmouseover"} & {key for key, _ in tags.attributes}
    json.loads((tmp_path / "correlations.json").read_text())
    with (tmp_path / "correlations.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            assert not any((line[key] or "x")[0] in "=+-@\t\r" for key in ("run", "statistic"))
    report.table.write_csv(tmp_path / "rows.csv")


def _literal(keys: list[str]) -> list[str]:
    """Returns globs that mean keys as they stand."""
    return ["".join(f"[{c}]" if c in "*?[" else c for c in key) for key in keys]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", " =", "\uff1d"])
@pytest.mark.parametrize("rest", ["1+1", "cmd|' /C calc'!A0", 'HYPERLINK("http://x")', "SUM(A1)"])
def test_no_cell_is_a_formula(first, rest):
    out = io.StringIO()
    csv.writer(out).writerow([csv_cell(first + rest)])
    ((cell,),) = csv.reader(io.StringIO(out.getvalue()))
    assert cell.startswith("'") or float(cell) == 11.0  # "+1+1" stays text, too
    assert cell[1:] == first + rest


@pytest.mark.parametrize("value", [-0.5, -3, 1e-9, "-0.5", "+1e-3", "-inf", "name", "", None])
def test_numbers_and_names_stay_as_they_are(value):
    assert csv_cell(value) == value


def test_every_table_that_is_written_quotes_formulas(tmp_path):
    record = RunRecord(
        "=1", "=name", "here", "csv", {"=key": "=value", "lr": -0.5, "text": "-0.5"},
        np.arange(5.0), {"val_loss": -np.arange(5.0), "=m": -np.arange(5.0) ** 2},
    )  # fmt: skip
    table = RunTable((record,))
    table.write_csv(tmp_path / "rows.csv")
    write_report(correlation_report(table, statistics=["=m"]), tmp_path)
    for file in ("rows.csv", "correlations.csv"):
        with (tmp_path / file).open(newline="") as opened:
            header, *lines = csv.reader(opened)
        assert not any(cell[:1] in ("=", "@", "+") for line in [header, *lines] for cell in line)
    with (tmp_path / "rows.csv").open(newline="") as opened:
        first = next(csv.DictReader(opened))
    assert (first["config.lr"], first["config.text"], first["val_loss"]) == ("-0.5", "-0.5", "-0.0")
    assert (first["run"], first["config.=key"]) == ("'=1", "'=value")


def test_numbers_that_json_has_none_for_are_null(tmp_path):
    series = {"val_loss": np.array([1.0, np.inf, 3, 2, 5]), "hessian/d_ks": np.full(5, np.nan)}
    series["hessian/d_ks"][:2] = 1, 2
    config = {"a": float("nan"), "b": float("-inf"), "c": "NaN"}
    table = RunTable((RunRecord("r", "r", "r", "csv", config, np.arange(5.0), series),))
    write_report(correlation_report(table), tmp_path)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = (tmp_path / "correlations.json").read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content["runs"][0]["config"] == {"a": None, "b": None, "c": "NaN"}


def test_figures_of_two_runs_whose_names_look_alike_are_two_files():
    rng = np.random.default_rng(0)
    runs = tuple(
        RunRecord(name, name, name, "csv", {}, np.arange(9.0),
                  {"val_loss": rng.normal(size=9), "hessian/d_ks": rng.normal(size=9)})
        for name in ("a b", "a_b", "A b" + 300 * "c")
    )  # fmt: skip
    names = [drawing.name for drawing in compose(correlation_report(RunTable(runs))).drawings]
    assert len({name.lower() for name in names}) == len(names) == 1 + 3  # that of the first screen
    assert max(map(len, names)) < 200


def test_the_terminal_sees_no_control_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run\x1b[2J\x07"
    folder.mkdir()
    lines = [f"{k},{1 / (k + 1)},{k * k}" for k in range(6)]
    (folder / "metrics.csv").write_text("\n".join(["step,val_loss,hessian/d_ks", *lines, "cut"]))
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out.partition("Report: ")[0] + printed.err
    assert "left out" in printed.err


# Figures of the live page ---------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "files"
    (folder / "media").mkdir(parents=True)
    (folder / "media" / "good.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "run" / "beside.png").write_bytes(PNG)
    (tmp_path / "run" / "files_of_another").mkdir()
    (tmp_path / "run" / "files_of_another" / "x.png").write_bytes(PNG)
    return folder


def test_a_png_of_the_run_is_read(files):
    assert read_png(files, "media/good.png") == PNG
    os.symlink(files / "media" / "good.png", files / "link.png")
    assert read_png(files, "link.png") == PNG
    assert read_png(files, "media/not_yet.png") is None


@pytest.mark.parametrize(
    "path",
    [
        "../../secret.png", "../beside.png", "../files_of_another/x.png", "media/../../beside.png",
        "ABSOLUTE", "/etc/hostname", "/etc/passwd", "out.png", "folder/secret.png", "/dev/zero",
        "device.png", "fifo.png", "media", ".", "", "text.png", "huge.png", "nul\0.png", "loop.png",
        "x" * 5000, "~/secret.png",
    ],
)  # fmt: skip
def test_nothing_else_is_read(path, files, tmp_path):
    os.symlink(tmp_path / "secret.png", files / "out.png")
    os.symlink(tmp_path, files / "folder")
    os.symlink("/dev/zero", files / "device.png")
    os.symlink(files / "loop.png", files / "loop.png")
    os.mkfifo(files / "fifo.png")
    (files / "text.png").write_text("password")
    with (files / "huge.png").open("wb") as file:
        file.write(PNG)
        file.truncate(MOST_BYTES + 1)
    path = str(tmp_path / "secret.png") if path == "ABSOLUTE" else path
    found, left_out = figures_of([{"figures/a.path": path}], files)
    assert found == []
    assert (len(left_out) == 1) == (path not in ("~/secret.png", "x" * 5000))  # not there
    assert "secret" not in "".join(left_out)


def test_a_folder_of_files_that_is_a_link_is_not_followed(files, tmp_path):
    os.symlink(files, tmp_path / "other_files")
    (tmp_path / "run2").mkdir()
    os.symlink(files, tmp_path / "run2" / "files")
    found, left_out = figures_of(
        [{"figures/a.path": "media/good.png"}], tmp_path / "run2" / "files"
    )
    assert (found, len(left_out)) == ([], 1)


def test_a_page_holds_only_so_many_figures(files):
    rows = [{f"figures/f{k}.path": "media/good.png" for k in range(100)}]
    found, left_out = figures_of(rows, files)
    assert len(found) == 40
    assert "60 figures are left out" in left_out[0]

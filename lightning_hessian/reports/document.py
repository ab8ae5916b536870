"""A report as a list of blocks, which becomes HTML or Markdown."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hessian.reports.figures import Drawing
from lightning_hessian.results.escaping import html_text, markdown_line, markdown_text, visible

# What marks our own text up. Asterisks and backticks would do for words that we wrote, but those of
# a run may hold any of them. These hold a number that is drawn anew in every process, so that no
# text from outside can hold them.
_BOLD, _END_BOLD, _CODE, _END_CODE = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(4))
_MARKED = re.compile(f"({_BOLD}|{_END_BOLD}|{_CODE}.*?{_END_CODE})", re.DOTALL)
_PLAIN_CODE = re.compile(r"[^`|\\<>&\s](?:[^`|\\<>&]*[^`|\\<>&\s])?")


@dataclass(frozen=True)
class Heading:
    """A section begins.

    Attributes:
        text: Its title.
    """

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph, marked up by `bold`, `code` and `marked` and by nothing else.

    Attributes:
        text: The words.
        muted: Whether it is a side note.
    """

    text: str
    muted: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list.

    Attributes:
        items: Its points, marked up like a `Text`.
    """

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: Titles of the columns.
        rows: Cells, marked up like a `Text`.
        words: How many columns at the end hold sentences instead of numbers.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 0


Block = Heading | Text | Bullets | Table | Drawing


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: The reader's question.
        blocks: What is said, in order.
    """

    title: str
    blocks: tuple[Block, ...]

    @property
    def drawings(self) -> tuple[Drawing, ...]:
        """The figures."""
        return tuple(block for block in self.blocks if isinstance(block, Drawing))


def code(text: str) -> str:
    """Return a key or a path, marked as such, whatever it holds."""
    return f"{_CODE}{visible(text)}{_END_CODE}"


def bold(text: str) -> str:
    """Return words that stand out."""
    return f"{_BOLD}{text}{_END_BOLD}"


def marked(text: str) -> str:
    """Return our own words with ``**bold**`` and backticks made into marks.

    Never give it text from outside: what that holds would become markup.
    """
    text = re.sub(r"\*\*(.+?)\*\*", rf"{_BOLD}\1{_END_BOLD}", text)
    return re.sub(r"`(.+?)`", rf"{_CODE}\1{_END_CODE}", text)


def to_html(document: Document) -> str:
    """Return one page that needs no network, follows light and dark, and prints."""
    body = "\n".join(_html_block(block) for block in document.blocks)
    title = html_text(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(document: Document, figure_folder: str = "figures") -> str:
    """Return the report in GitHub's Markdown; figures are files in a folder beside it."""
    parts = [f"# {markdown_text(document.title)}"]
    parts += [_markdown_block(block, figure_folder) for block in document.blocks]
    return "\n\n".join(parts) + "\n"


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_html_inline(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p{' class=muted' if block.muted else ''}>{_html_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_html_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        return _html_table(block)
    caption = f"<figcaption>{html_text(block.caption)}</figcaption>"
    return f"<figure>\n{block.inline}\n{caption}\n</figure>"


def _html_table(table: Table) -> str:
    first_words = len(table.header) - table.words
    classes = [
        "name" if place == 0 else "words" if place >= first_words else "number"
        for place in range(len(table.header))
    ]
    head = "".join(
        f'<th scope="col" class="{kind}">{_html_inline(cell)}</th>'
        for kind, cell in zip(classes, table.header, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}">{_html_inline(cell)}</td>'
            for kind, cell in zip(classes, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _html_inline(text: str) -> str:
    tags = {_BOLD: "<strong>", _END_BOLD: "</strong>"}
    parts = _MARKED.split(text)
    return "".join(
        html_text(part)
        if place % 2 == 0
        else tags.get(part) or f"<code>{html_text(_inside(part))}</code>"
        for place, part in enumerate(parts)
    )


def _inside(part: str) -> str:
    return part.removeprefix(_CODE).removesuffix(_END_CODE)


def _markdown_block(block: Block, folder: str) -> str:
    if isinstance(block, Heading):
        return f"## {_markdown_inline(block.text)}"
    if isinstance(block, Text):
        text = _markdown_inline(block.text)
        return f"*{text}*" if block.muted else markdown_line(text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {markdown_line(_markdown_inline(item))}" for item in block.items)
    if isinstance(block, Table):
        return _markdown_table(block)
    return f"![{markdown_text(block.caption)}]({folder}/{block.name}.svg)"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_markdown_inline, cells)) + " |"

    numbers = len(table.header) - 1 - table.words
    rule = "|" + "|".join(["---", *["--:"] * numbers, *["---"] * table.words]) + "|"
    return "\n".join([line(table.header), rule, *map(line, table.rows)])


def _markdown_inline(text: str) -> str:
    """Return text in which what a run was called cannot become markup."""
    parts = _MARKED.split(" ".join(text.split()))
    return "".join(
        _spaced_markdown(part)
        if place % 2 == 0
        else "**"
        if part in (_BOLD, _END_BOLD)
        else _markdown_code(_inside(part))
        for place, part in enumerate(parts)
    )


def _spaced_markdown(text: str) -> str:
    """Return `markdown_text` of a part of a line, with the spaces at its ends kept."""
    if not text.strip():
        return text
    before, after = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return " " * min(before, 1) + markdown_text(text) + " " * min(after, 1)


def _markdown_code(text: str) -> str:
    """Return a code span, or words where a span could end before its text does."""
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else markdown_text(text)


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is loaded or run

_CSS = """
:root { color-scheme: light dark; --ink: #1b1c1d; --soft: #5b6068; --paper: #ffffff;
  --line: #d9dce1; --band: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a2a8b0; --paper: #16181b;
  --line: #383c42; --band: #1f2226; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line);
  padding-bottom: .25rem; }
p, ul { max-width: 46rem; }
.muted, figcaption { color: var(--soft); font-size: .9rem; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.number { white-space: normal; }
.words { min-width: 13rem; }
.name { white-space: nowrap; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 60rem; }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important; }
@media (max-width: 40rem) { main { padding: 1.25rem .75rem 3rem; } table { font-size: .8125rem; }
  th, td { padding: .35rem .4rem; } figure { overflow-x: auto; }
  figure svg { min-width: 34rem; } figcaption { position: sticky; left: 0; } }
@media print {
  @page { margin: 14mm; }
  :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff; }
  body { font-size: 9.5pt; } main { max-width: none; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } .words { min-width: 0; }
  figure svg { max-height: 150mm; }
  th, td { padding: .2rem .3rem; }
  tr { break-inside: avoid; } h2 { break-after: avoid; } thead { display: table-header-group; }
}
"""

"""A report as a list of blocks, which becomes HTML or Markdown."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lightning_hessian.reports.figures import Drawing
from lightning_hessian.reports.pages import render
from lightning_hessian.results.escaping import markdown_line, markdown_text, visible

# What marks our own text up. Asterisks and backticks would do for words that we wrote, but those of
# a run may hold any of them. These hold a number that is drawn anew in every process, so that no
# text from outside can hold them.
_BOLD, _END_BOLD, _CODE, _END_CODE = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(4))
_MARKED = re.compile(f"({_BOLD}|{_END_BOLD}|{_CODE}.*?{_END_CODE})", re.DOTALL)
_PLAIN_CODE = re.compile(r"[^`|\\<>&\s](?:[^`|\\<>&]*[^`|\\<>&\s])?")


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

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
    """A list of points, marked up like a `Text`."""

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

    def cells(self, row: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield the cells of a row (or of the header), each behind the kind of its column."""
        first_words = len(self.header) - self.words
        for place, cell in enumerate(row):
            yield "name" if place == 0 else "words" if place >= first_words else "number", cell


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
    blocks = [(type(block).__name__, block) for block in document.blocks]
    return render("report.html", title=document.title, blocks=blocks, inline=_html_inline)


def to_markdown(document: Document, figure_folder: str = "figures") -> str:
    """Return the report in GitHub's Markdown; figures are files in a folder beside it."""
    parts = [f"# {markdown_text(document.title)}"]
    parts += [_markdown_block(block, figure_folder) for block in document.blocks]
    return "\n\n".join(parts) + "\n"


def _html_inline(text: str) -> Markup:
    """Return words with our own marks as tags, and all else as text."""
    tags = {_BOLD: Markup("<strong>"), _END_BOLD: Markup("</strong>")}
    parts = [
        visible(part)
        if place % 2 == 0
        else tags.get(part) or Markup("<code>{}</code>").format(visible(_inside(part)))
        for place, part in enumerate(_MARKED.split(text))
    ]
    return Markup("").join(parts)


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

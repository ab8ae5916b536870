"""What comes from outside (names, keys, paths of foreign runs), made harmless where it is shown.

A run's files may come from anybody. Their texts are data: each surface that shows them (Markdown,
CSV, the terminal) has one function here, and nothing else decides what is escaped. HTML is escaped
by the templates of `reports/pages.py`.
"""

from __future__ import annotations

import html
import re
from typing import Any

# Control characters, the marks that turn the direction of writing around (a name could show another
# name), private code points, and lone surrogates, which no file can hold.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff\ud800-\udfff]"
)
_BACKSLASHED = re.compile(r"([\\_*\[\]#])")
_AS_ENTITIES = {ord(mark): f"&#{ord(mark)};" for mark in "`|~$@{}"}
_SCHEME = re.compile(r"(?<=\w):(?=\S)")
_WWW = re.compile(r"(www)\.", re.IGNORECASE)
_LIST_MARK = re.compile(r"^(\s*)([-+=]|\d+(?=[.)]))")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *"\uff1d\uff0b\uff0d\uff20")  # full-width too


def visible(text: str) -> str:
    r"""Return text with a replacement character for whatever cannot be seen, or misleads.

    Example:
        >>> visible("run\x1b[2J")
        'run�[2J'
    """
    return _INVISIBLE.sub("\ufffd", text)


def markdown_text(text: str) -> str:
    r"""Return text that no Markdown renderer takes for markup: no tags, links, images, tables.

    What begins an address or a mention (``https:``, ``www.``, ``@``), and a formula (``$``) on
    GitHub, is broken by an entity, which every renderer shows as the character itself.

    Example:
        >>> markdown_text("[a](javascript:b) <i> `c`")
        '\\[a\\](javascript&#58;b) &lt;i&gt; &#96;c&#96;'
    """
    text = html.escape(" ".join(visible(text).split()), quote=False)
    text = _BACKSLASHED.sub(r"\\\1", text).translate(_AS_ENTITIES)
    return _WWW.sub(r"\1&#46;", _SCHEME.sub("&#58;", text))


def markdown_line(text: str) -> str:
    """Return what `markdown_text` returned, so that it begins no list, rule or heading.

    Example:
        >>> markdown_line("1. run"), markdown_line("- run")
        ('1&#46; run', '&#45; run')
    """
    found = _LIST_MARK.match(text)
    if found is None:
        return text
    rest = text[found.end() :]
    if found[2].isdigit():
        return f"{found[1]}{found[2]}&#{ord(rest[0])};{rest[1:]}"
    return f"{found[1]}&#{ord(found[2])};{rest}"


def csv_cell(value: Any) -> Any:
    """Return what a cell of a CSV file holds: text that a spreadsheet would run is quoted.

    Numbers stay numbers, also those that were logged as text.

    Source: OWASP, CSV Injection.

    Example:
        >>> csv_cell("=1+1"), csv_cell(-0.5), csv_cell("-0.5")
        ("'=1+1", -0.5, '-0.5')
    """
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")
    if not text.lstrip(" \u00a0\ufeff").startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text.strip()

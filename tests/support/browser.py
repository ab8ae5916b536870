"""A page in Chromium: what it draws, without anybody looking."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

_PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const late = document.documentElement, texts = [...document.querySelectorAll("svg text")];
  const cut = texts.filter((t) => { const a = t.getBoundingClientRect(),
    b = t.ownerSVGElement.getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1; });
  const marks = [...document.querySelectorAll(".runs i")];
  const lines = [...document.querySelectorAll("polyline")];
  document.title = JSON.stringify({ svgs: document.querySelectorAll("svg").length,
    texts: texts.length, wide: late.scrollWidth,
    cut: cut.map((t) => t.textContent + " of " + t.ownerSVGElement.textContent),
    inner: innerWidth, background: getComputedStyle(document.body).backgroundColor,
    strokes: [...new Set(lines.map((l) => getComputedStyle(l).stroke))],
    swatches: marks.map((i) => getComputedStyle(i).backgroundColor),
    lines: lines.length,
    small: Math.min(...texts.map((t) => parseFloat(getComputedStyle(t).fontSize))) });
}, 300));</script>"""


def drawn(page: Path, width: int, dark: bool, folder: Path, before: str = "") -> dict[str, Any]:
    """Returns what the browser says of a page, in a window so wide, light or dark.

    ``before`` is a script that runs ahead of the page's own.
    """
    text = page.read_text().replace("</body>", _PROBE + "</body>")
    if before:
        text = text.replace("<main>", f"<script>{before}</script><main>", 1)
    page.write_text(text)
    run = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []),
         "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    found = re.search(r"<title>(\{.*?\})</title>", run.stdout)
    assert found, run.stderr[-500:]
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    light = sum(map(int, re.findall(r"\d+", seen["background"])[:3]))
    assert (light < 150) == dark
    assert seen["cut"] == []
    assert seen["wide"] <= seen["inner"]
    assert seen["small"] >= 12
    return seen

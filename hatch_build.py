"""Makes the README's links work wherever it is shown: hatchling asks for this when it builds.

On the page of a package index a link such as ``docs/start.md`` leads nowhere. It becomes one into
the repository that ``[project.urls]`` names, at the tag of this version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#", re.IGNORECASE)


def with_absolute_links(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose relative links lead into the repository, pictures to their bytes."""

    def absolute(found: re.Match[str]) -> str:
        if _ELSEWHERE.match(found["path"]):
            return found[0]
        view = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({repository}/{view}/{tag}/{found['path']})"

    return _LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Gives the metadata of the package their readme."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the readme, in which links are absolute."""
        root = Path(self.root)
        source = (root / "lightning_hessian" / "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "([^"]+)"', source, re.MULTILINE)
        assert version is not None
        readme = (root / "README.md").read_text(encoding="utf-8")
        repository = metadata["urls"]["Repository"]
        text = with_absolute_links(readme, repository, f"v{version[1]}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}

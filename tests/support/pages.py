"""What a live page holds, read back."""

from __future__ import annotations

import json
import re
from typing import Any


def data_of(page: str) -> dict[str, Any]:
    """Returns the data in the text of a page."""
    (text,) = re.findall(r"^const data = (.*);$", page, flags=re.MULTILINE)
    return json.loads(text)

"""Pages from the templates of this room: whatever is put into one is text, never markup."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_hessian.results.escaping import visible


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of values.

    Args:
        template: Name of the file in ``templates/``.
        values: What the template calls by name; texts are escaped, `markupsafe.Markup` is not.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("lightning_hessian.reports"),
        autoescape=True,
        # Markup is a kind of str, made by us; a plain str may come from outside.
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` escapes what would end a script; without this it would also sort the keys.
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return found

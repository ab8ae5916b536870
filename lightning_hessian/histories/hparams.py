"""Hyperparameters that Lightning wrote beside the metrics, read without running anything.

Lightning writes them with PyYAML's full dumper: a list that is given twice becomes an anchor and an
alias, a tuple or an enum becomes a tag of Python's. The first are counted, so that a few lines
cannot unfold into billions; of the second, tuples are lists and the rest is text.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lightning_hessian.histories.run_table import ConfigValue, flat_config
from lightning_hessian.results import UnreadableFileError, bounds
from lightning_hessian.results.outside import inside, printable, read_bounded, reason, unreadable

_NUM_NODES = 100_000
"""Nodes after all aliases are unfolded; a file within its bound has fewer."""


def read_hparams(file: Path, problems: list[str]) -> dict[str, ConfigValue]:
    """Return the hyperparameters in a file, nested keys joined by dots; none where there is none.

    Args:
        file: ``hparams.yaml``.
        problems: A sentence is added where the file cannot be read.
    """
    try:
        if not file.exists():
            return {}
        inside(file, file.parent)
        text = read_bounded(file, bounds.CONFIG_BYTES).decode("utf-8", errors="replace")
        loader = _loader()
        with unreadable(file.name):
            loaded = loader(text).get_single_data()
            return flat_config(loaded) if isinstance(loaded, dict) else {}
    except (UnreadableFileError, OSError, ModuleNotFoundError) as error:
        problems.append(f"{file.name} left out: {reason(error)}")
        return {}


@functools.cache
def _loader() -> Any:
    """Return PyYAML's safe loader with bounds on depth and unfolded size."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    class Bounded(yaml.SafeLoader):  # type: ignore[misc]
        """A safe loader in which a node costs what it unfolds to."""

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.depth = self.nodes = 0
            self.sizes: dict[str, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                # An alias within its own anchor has no size yet: it would refer to itself.
                if event.anchor in self.anchors and event.anchor not in self.sizes:
                    raise ValueError(f"{event.anchor!r} refers to itself")
                self.count(self.sizes.get(event.anchor, 0))
                return super().compose_node(parent, index)
            before = self.nodes
            self.count(1)
            self.depth += 1
            if self.depth > bounds.DEPTH:
                raise ValueError(f"it is nested deeper than {bounds.DEPTH}")
            if event.anchor is not None:
                self.sizes.pop(event.anchor, None)
            node = super().compose_node(parent, index)
            self.depth -= 1
            if event.anchor is not None:
                self.sizes[event.anchor] = self.nodes - before
            return node

        def count(self, nodes: int) -> None:
            self.nodes += nodes
            if self.nodes > _NUM_NODES:
                raise ValueError(f"it unfolds to more than {_NUM_NODES} values")

        def whole_number(self, node: Any) -> Any:
            if len(node.value) > bounds.DIGITS:
                return printable(node.value, 40)
            return self.construct_yaml_int(node)

        def list_of(self, _suffix: str, node: Any) -> Any:
            if isinstance(node, yaml.SequenceNode):
                return self.construct_sequence(node, deep=True)
            return self.as_text(_suffix, node)

        def as_text(self, suffix: str, node: Any) -> Any:
            plain = isinstance(node, yaml.ScalarNode) and node.value
            return node.value if plain else suffix

    Bounded.add_constructor("tag:yaml.org,2002:int", Bounded.whole_number)
    Bounded.add_multi_constructor("tag:yaml.org,2002:python/tuple", Bounded.list_of)
    Bounded.add_multi_constructor("tag:yaml.org,2002:python/", Bounded.as_text)
    Bounded.add_multi_constructor("!", Bounded.as_text)
    return Bounded

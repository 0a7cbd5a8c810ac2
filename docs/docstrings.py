"""Griffe extension: the ``>>>`` examples of docstrings become code blocks.

The project's docstrings hold bare doctests, which Markdown would take for quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A line that starts with >>>, and what follows it up to an empty line.
_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


def fence_examples(text: str) -> str:
    """The text with every doctest in a fenced block."""
    return _EXAMPLE.sub(
        lambda match: f"{match['indent']}```pycon\n{match[0]}\n{match['indent']}```", text
    )


class Doctests(griffe.Extension):
    """Applies `fence_examples` to everything that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object once its members are there."""
        if obj.docstring is not None:
            obj.docstring.value = fence_examples(obj.docstring.value)

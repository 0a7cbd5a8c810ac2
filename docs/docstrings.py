"""Griffe extension: docstrings as the API reference needs them.

The ``>>>`` examples become code blocks: bare doctests, Markdown would take for quotations. What the
comments at a class's fields say joins its docstring as a section of attributes.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tokenize
from collections.abc import Mapping
from io import StringIO
from typing import Any

import griffe

# A line that starts with >>>, and what follows it up to an empty line.
_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n *\S.*)*", re.MULTILINE)
# Where a section of a Google-style docstring begins, or an example.
_SECTION = re.compile(r"^(?:[A-Z]\w+:$|>>> )", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^Attributes:\n(?P<entries>(?:  .*\n?)+)", re.MULTILINE)


def fence_examples(text: str) -> str:
    """The text with every doctest in a fenced block."""
    return _EXAMPLE.sub(
        lambda match: f"{match['indent']}```pycon\n{match[0]}\n{match['indent']}```", text
    )


def field_comments(source: str) -> dict[str, str]:
    """What the comments in a class's source say of its annotated fields, by name.

    A field's comment stands behind it, or in lines of its own above it. A comment that opens a
    paragraph of several fields is their heading, and of none of them.
    """
    source = textwrap.dedent(source)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = ["", *source.splitlines(), ""]
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        last = node.end_lineno or node.lineno
        said = [comments[n] for n in range(node.lineno, last + 1) if n in comments]
        if not said:
            above = node.lineno
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            is_heading = not lines[above - 1].strip() and lines[last + 1].strip()
            said = [] if is_heading else [comments[n] for n in range(above, node.lineno)]
        if said:
            found[node.target.id] = " ".join(said)
    return found


def _plain(text: str) -> str:
    """Text whose special characters Markdown leaves alone, but for what stands in backticks."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<\[\]{}])", r"\\\1", part)
        for part in parts
    )


def add_attributes(text: str, comments: Mapping[str, str]) -> str:
    """The docstring with an entry for each commented field that it does not describe itself."""
    own = _ATTRIBUTES.search(text)
    described = re.findall(r"^  (\w+):", own["entries"], re.MULTILINE) if own else []
    entries = "".join(
        f"  {name}: {_plain(comment)}\n"
        for name, comment in comments.items()
        if name not in described
    )
    if not entries:
        return text
    if own:
        return f"{text[: own.end()].rstrip()}\n{entries}{text[own.end() :]}"
    section = _SECTION.search(text)
    place = section.start() if section else len(text)
    return f"{text[:place].rstrip()}\n\nAttributes:\n{entries}\n{text[place:]}".rstrip()


class Docstrings(griffe.Extension):
    """Applies these to everything that has a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object once its members are there."""
        if obj.docstring is None:
            return
        if obj.is_class:
            comments = field_comments(obj.source)
            obj.docstring.value = add_attributes(obj.docstring.value, comments)
        obj.docstring.value = fence_examples(obj.docstring.value)

"""The API reference: what stands in comments at fields is there, and so is what pages import."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import stp_jax
from stp_jax import hwmodel

DOCS = Path(__file__).parents[2] / "docs"
griffe = pytest.importorskip("griffe")


@pytest.fixture(scope="module")
def docstrings():
    """The Griffe extension, which mkdocstrings loads by path as well."""
    spec = importlib.util.spec_from_file_location("docs_docstrings", DOCS / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = '''
    class Sample:
        """What it is.

        Raises:
          ValueError: never.
        """

        # Numbers.
        one: int  # the first
        two: int
        # The third, which
        # takes two lines.
        three: int = 3

        four: str = "# of none"

        # A paragraph of its own.
        five: tuple = (
            1,
            2,
        )

        def method(self):
            x: int = 0  # of no field
'''


def test_a_field_s_comment_is_behind_it_or_above_it(docstrings):
    assert docstrings.field_comments(SOURCE) == {
        "one": "the first",
        "three": "The third, which takes two lines.",
        "five": "A paragraph of its own.",
    }


def test_attributes_stand_before_other_sections_and_join_those_there_are(docstrings):
    text = "What it is.\n\nRaises:\n  ValueError: never."
    with_one = docstrings.add_attributes(text, {"one": "2**b of `a_b`"})
    assert with_one == (
        "What it is.\n\nAttributes:\n  one: 2\\*\\*b of `a_b`\n\nRaises:\n  ValueError: never."
    )
    both = docstrings.add_attributes(with_one, {"one": "no", "two": "second"})
    assert "`a_b`\n  two: second\n\nRaises:" in both and "no\n" not in both
    assert docstrings.add_attributes(text, {}) == text


@pytest.mark.parametrize("kind", [stp_jax.Rule, hwmodel.Array, hwmodel.Layer, hwmodel.GroupPE])
def test_the_reference_describes_fields_with_their_types(docstrings, kind):
    extensions = griffe.load_extensions(docstrings.Docstrings)
    root = DOCS.parent
    loaded = griffe.load(f"{kind.__module__}", search_paths=[root], extensions=extensions)
    sections = loaded[kind.__name__].docstring.parse("google", warnings=False)
    (attributes,) = (s.value for s in sections if s.kind is griffe.DocstringSectionKind.attributes)
    described = {attribute.name: str(attribute.annotation) for attribute in attributes}
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    assert described.items() <= fields.items()
    commented = docstrings.field_comments(textwrap.dedent(inspect.getsource(kind)))
    assert set(commented) <= set(described)
    if kind is stp_jax.Rule:
        assert set(described) == set(fields)


def imported():
    """What the pages' Python blocks import from the package, as (module, name)."""
    for page in sorted(DOCS.glob("*.md")):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("stp_jax"):
                    yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize(("module", "name"), sorted(set(imported())))
def test_what_pages_import_has_an_entry(hooks, module, name):
    if inspect.ismodule(getattr(importlib.import_module(module), name)):
        return
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = f"generate: api {module} -->" in pages and name in hooks.public_names(module)
    assert listed or f"::: {module}.{name}\n" in pages

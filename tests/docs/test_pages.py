"""The pages' Python blocks run, in order and in one namespace a page, and print what is shown.

A ``python`` block is run; a ``text`` block right behind it is what it prints. Code of other tools
is marked ``py`` instead, which is highlighted alike and not run. The blocks see JAX's default
settings, as a reader's session does.
"""

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import jax
import pytest

from experiments.context import DATA
from experiments.stages import STAGES
from stp_jax.models import MODELS
from stp_jax.terms import ENCODINGS, METHODS

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<shown>.*?)^```)?", re.MULTILINE | re.DOTALL
)
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text())


def lines(text):
    """Without the blanks at the ends of lines, which editors strip."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


@pytest.fixture(autouse=True)
def registries():
    """Pages may add models, encodings, stages and more; other tests must not see them."""
    registries = (MODELS, ENCODINGS, METHODS, STAGES, DATA)
    before = [(registry, dict(registry)) for registry in registries]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run_and_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    if "import onnxruntime" in text:
        pytest.importorskip("onnxruntime", reason="an extra of the package")
        pytest.importorskip("onnx", reason="an extra of the package")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in BLOCK.finditer(text):
            # Lines of the page, so that a traceback points there.
            above = text[: block.start("code")].count("\n")
            code = compile("\n" * above + block["code"], str(page), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, module.__dict__)
            if block["shown"] is not None:
                assert lines(printed.getvalue()) == lines(block["shown"])


def test_every_public_page_is_listed():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in navigation

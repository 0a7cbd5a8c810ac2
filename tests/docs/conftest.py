import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hooks():
    """The module that generates tables and API pages; MkDocs loads it by path as well."""
    path = Path(__file__).parents[2] / "docs" / "hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

import pytest

from benchmarks.rtl.liberty import Library
from tests.benchmarks.tiny_library import TINY


@pytest.fixture(scope="session")
def tiny():
    return Library(TINY)

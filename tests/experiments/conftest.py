import os
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def compilation_cache():
    """The runs that tests start compile the same programs: let them share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path(os.environ["STP_JAX_TESTS"], "jax")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield

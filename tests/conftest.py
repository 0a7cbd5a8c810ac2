"""Strict JAX settings for every test, and eight virtual CPU devices."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the time of a test is compilation, so programs are compiled fast here, not to be fast. The
# main job of `.ci/run` compiles as users do. XLA aborts on a flag that it does not know.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith("0.10."),
)

# Tests count compilations, and leave nothing in the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation makes single examples slow at random; no test here is about time.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")

# Cases that took longest: what `pytest --durations=0 --durations-min=1` listed as "call".
SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().split())


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker("slow")

"""Strict JAX settings for every test, eight virtual CPU devices, and the order of the files."""

import atexit
import os
import shutil
import tempfile
from collections import Counter
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

# An empty cache saved nothing within a file (two files measured), and tests count compilations.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation makes single examples slow at random; no test here is about time.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")

# The data set that runs prepare is prepared once, and not in the user's folder.
# The first process makes this folder and removes it; those that it starts find it.
if "STP_JAX_TESTS" not in os.environ:
    os.environ["STP_JAX_TESTS"] = tempfile.mkdtemp(prefix="stp_jax-tests-")
    atexit.register(shutil.rmtree, os.environ["STP_JAX_TESTS"], ignore_errors=True)
SHARED = Path(os.environ["STP_JAX_TESTS"])
os.environ["TFDS_DATA_DIR"] = str(SHARED / "tensorflow_datasets")

# Test functions that take long, with their seconds.
DURATIONS = Path(__file__).parent / "durations.txt"
SECONDS = {name: float(value) for value, name in map(str.split, DURATIONS.read_text().splitlines())}
SLOW = 0.5


def pytest_addoption(parser):
    parser.addoption(
        "--store-durations",
        action="store_true",
        help="write tests/durations.txt anew, from this run of all tests",
    )


def function(nodeid):
    return nodeid.partition("[")[0]


def pytest_collection_modifyitems(config, items):
    for item in items:
        if SECONDS.get(function(item.nodeid), 0) >= SLOW:
            item.add_marker("slow")
    # Processes take file after file: the longest ones first, so that all processes end together.
    if hasattr(config, "workerinput"):
        names = dict.fromkeys(function(item.nodeid) for item in items)  # alike in all processes
        files = Counter()
        for name in names:
            files[name.partition("::")[0]] += SECONDS.get(name, 0)
        items.sort(key=lambda item: -files[item.nodeid.partition("::")[0]])


class StoredDurations:
    """Seconds of each test function, written at the end."""

    def __init__(self):
        self.seconds = Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[function(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        kept = [(s, name) for name, s in self.seconds.items() if s >= SLOW]
        lines = [f"{s:.1f} {name}\n" for s, name in sorted(kept, key=lambda kept: kept[1])]
        DURATIONS.write_text("".join(lines))


def pytest_configure(config):
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(StoredDurations())

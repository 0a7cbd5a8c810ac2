"""Where compiled programs are kept, and that the user's own choice stays."""

import os
import subprocess
import sys

PROGRAM = """
import jax
from experiments.runtime.compilation import keep_compilations
keep_compilations()
print(jax.config.jax_compilation_cache_dir)
"""


def chosen(**variables):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_programs_are_kept_in_the_cache_folder_unless_another_is_named(tmp_path):
    assert chosen(XDG_CACHE_HOME=str(tmp_path)).startswith(str(tmp_path / "stp_jax"))
    own = str(tmp_path / "own")
    assert chosen(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=own) == own
    assert not list(tmp_path.iterdir()), "nothing is compiled, so nothing is written"

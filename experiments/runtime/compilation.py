"""Compiled programs kept on disk, so that a resumed or repeated run starts warm."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax


def _machine() -> str:
    """A name for machines that run each other's programs: the architecture, the CPU's features."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def keep_compilations() -> None:
    """Lets JAX keep what it compiles in ``~/.cache/stp_jax``, unless it was told another place.

    ``JAX_COMPILATION_CACHE_DIR`` names that place, and ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps
    nothing (JAX's own variables). Programs that compile in less than 0.3 s are not worth a file.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "stp_jax" / _machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

"""One run at a time in a work folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from experiments.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a folder as long as the context lasts; the system lets go of it if the process dies.

    Raises:
      ConfigError: another process holds it.
    """
    with (workdir / ".lock").open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run is working in {workdir}; wait for it, or use another --workdir"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield

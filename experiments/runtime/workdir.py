"""The work folder of a run: its claim, its lock, and the message of a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import filelock

from experiments.config import ConfigError, differences
from experiments.runtime.log import write_json


def check_run(workdir: Path, name: str, config: Any, *, ignore: Collection[str] = ()) -> None:
    """Makes sure that a folder holds no run, or this very one, but for keys to ignore.

    Raises:
      ConfigError: the folder holds a run of another configuration, or a damaged one.
    """
    stored = workdir / "config.json"
    if not stored.exists():
        return
    try:
        theirs = json.loads(stored.read_text())
        own = {key: getattr(config, key) for key in ignore}
        changed = differences(config, {**theirs["config"], **own})
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ConfigError(f"{stored} is not a run's configuration; use another --workdir") from None
    if changed or theirs["experiment"] != name:
        raise ConfigError(
            f"{workdir} holds a run of {theirs['experiment']} with another configuration "
            f"({'; '.join(changed) or 'same keys'}); use another --workdir"
        )


def claim_workdir(workdir: Path, name: str, config: Any) -> None:
    """Makes the run's folder, or makes sure that it holds this very run.

    Raises:
      ConfigError: the folder holds something else, or a run of another configuration.
    """
    stored = workdir / "config.json"
    check_run(workdir, name, config)
    if stored.exists():
        return
    # A kill while the configuration was written leaves a part of it, and nothing else.
    if workdir.exists() and (
        not workdir.is_dir() or {path.name for path in workdir.iterdir()} - {"config.json.partial"}
    ):
        raise ConfigError(f"{workdir} exists and is not a run's folder; use another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(stored, {"experiment": name, "config": dataclasses.asdict(config)})


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a folder to this process; the system frees it if the process dies.

    Raises:
      ConfigError: another process works in it.
    """
    lock = filelock.FileLock(workdir / ".lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"another run is working in {workdir}; wait for it, or use another --workdir"
        ) from None
    except (NotImplementedError, OSError):  # a network file system without locks
        yield
        return
    with lock:
        yield


_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that a disk or a quota is full.

    >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    >>> disk_is_full(ValueError("Error writing: [OS error 28: No space left on device]"))
    True
    >>> disk_is_full(OSError(errno.EACCES, "Permission denied"))
    False
    """
    words = [os.strerror(number) for number in _NUMBERS]
    return any(
        getattr(cause, "errno", None) in _NUMBERS or any(word in str(cause) for word in words)
        for cause in _chain(error)
    )


def disk_full_message(workdir: Path) -> str:
    """The message of a full disk."""
    return (
        f"the disk of {workdir} is full, or its quota; the last good checkpoint is kept. "
        "Free some space and run the same command again to continue"
    )

"""A disk that is full, recognised in whatever a library made of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_full(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that a disk or a quota is full.

    >>> is_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    >>> is_full(ValueError("Error writing: [OS error 28: No space left on device]"))
    True
    >>> is_full(OSError(errno.EACCES, "Permission denied"))
    False
    """
    words = [os.strerror(number) for number in _NUMBERS]
    return any(
        getattr(cause, "errno", None) in _NUMBERS or any(word in str(cause) for word in words)
        for cause in _chain(error)
    )


def message(workdir: Path) -> str:
    """What to tell about it."""
    return (
        f"the disk of {workdir} is full, or its quota; the last good checkpoint is kept. "
        "Free some space and run the same command again to continue"
    )

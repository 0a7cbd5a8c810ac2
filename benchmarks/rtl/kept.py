"""Results kept on disk, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def digest(files: Iterable[Path], *parts: object) -> str:
    """Of files' contents and of what ``parts`` pickle to."""
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(hashlib.sha256(file.read_bytes()).digest())
    hashed.update(pickle.dumps(parts, protocol=4))
    return hashed.hexdigest()[:16]


def kept(directory: Path | None, name: str, key: str, make: Callable[[], Result]) -> Result:
    """What an earlier call with this name and key made, else ``make()``, which is then kept.

    Args:
      directory: for the files, made where it is missing; nothing is kept where it is None.
        They are pickles: take no directory from elsewhere.
      name: of the file, with the key.
      key: `digest` of all that the result depends on.
      make: the result.
    """
    if directory is None:
        return make()
    path = directory / f"{name}-{key}.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())
    made = make()
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")  # a run that is cut off leaves no half of a result
    part.write_bytes(pickle.dumps(made))
    part.replace(path)
    return made

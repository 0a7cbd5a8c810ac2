"""Manifests: SHA-256 digests of a folder's files, by which damaged ones are recognised."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


def _digest(path: Path) -> str:
    """SHA-256 of a file, which is on the disk itself afterwards and not only in its cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Records the SHA-256 of every file in the folder's subfolders, in a file of its own.

    Orbax writes files of its own bookkeeping, which restoring does without, beside them later.
    """
    digests = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.glob("*/**/*"))
        if path.is_file()
    }
    with (folder / NAME).open("w") as file:
        json.dump({"sha256": digests}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """Damage of the folder's files, in words; None if all are as they were recorded."""
    try:
        digests = json.loads((folder / NAME).read_text())["sha256"]
    except FileNotFoundError:
        return f"it is unfinished (it has no {NAME})"
    except (ValueError, KeyError, TypeError):
        return f"its {NAME} is damaged"
    if not isinstance(digests, dict):
        return f"its {NAME} is damaged"
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if _digest(path) != expected:
            return f"its file {name} is damaged"
    return None

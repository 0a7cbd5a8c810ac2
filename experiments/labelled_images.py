"""A few labelled images of ImageNet's classes: a folder or a tar file with ``labels.csv``.

The table's columns are ``file`` (a path beside the table) and ``class_index`` (0 to 999). Images
are brought to the size that a network is evaluated at: shorter side resized, centre cropped.
"""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.config import ConfigError

_TABLE, _COLUMNS = "labels.csv", ("file", "class_index")
_MOST_PIXELS = 1 << 26  # of an image once its shorter side is resized
# What a damaged image leads to, or one that is not there.
_UNREADABLE = (KeyError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class LabelledImages(NamedTuple):
    """Images in the order of their table."""

    files: list[str]
    images: np.ndarray  # uint8 [N, size, size, 3]
    labels: np.ndarray  # int32 [N]


def _reader(path: Path) -> Callable[[str], bytes]:
    """Reads a file by its name beside the table; KeyError or OSError where there is none."""
    if path.is_dir():
        return lambda name: (path / name).read_bytes()
    if not path.is_file():
        raise ConfigError(f"data_dir={path}: there is no such folder or tar file")
    try:
        with tarfile.open(path) as archive:
            files = {
                member.name.removeprefix("./"): archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile()
            }
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ConfigError(f"data_dir={path} is no tar file, or is damaged: {error!r}") from error
    return lambda name: files[name]


def _crop(image: Image.Image, size: int, shorter: int) -> np.ndarray:
    image = image.convert("RGB")
    if min(image.size) != shorter:
        scale = shorter / min(image.size)
        width, height = (max(shorter, round(side * scale)) for side in image.size)
        if width * height > _MOST_PIXELS:
            raise ValueError(f"its sides {image.size} differ too much")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def load_labelled_images(
    path: Path, *, size: int = 224, shorter: int = 256, classes: int = 1000
) -> LabelledImages:
    """Reads all images that the table names.

    Args:
      path: a folder, or a tar file of one, with ``labels.csv``.
      size: side of the centre crop.
      shorter: what the shorter side is resized to, if it is not that already.
      classes: labels are below it.

    Raises:
      ConfigError: the table, a column or an image is missing or damaged; the message names it.
    """
    read = _reader(path)
    try:
        rows = list(csv.DictReader(io.StringIO(read(_TABLE).decode())))
    except (KeyError, OSError, UnicodeDecodeError, csv.Error):
        raise ConfigError(
            f"data_dir={path} has no readable {_TABLE}, a table with the columns "
            + ", ".join(_COLUMNS)
        ) from None
    if not rows or any(column not in rows[0] for column in _COLUMNS):
        raise ConfigError(f"{path}/{_TABLE} must have rows of the columns {', '.join(_COLUMNS)}")
    images, labels = [], []
    for row in rows:
        name, text = row["file"], row["class_index"]
        if not (text or "").isdigit() or int(text) >= classes:
            raise ConfigError(f"{path}/{_TABLE}: {name} has class_index {text!r}, not 0 to 999")
        try:
            images.append(_crop(Image.open(io.BytesIO(read(name))), size, shorter))
        except _UNREADABLE as error:
            raise ConfigError(f"{path}: {name} cannot be read: {error!r}") from error
        labels.append(int(text))
    files = [row["file"] for row in rows]
    return LabelledImages(files, np.stack(images), np.array(labels, np.int32))

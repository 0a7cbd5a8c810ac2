"""Image folders: a tree train/CLASS/*, test/CLASS/* as torchvision's ImageFolder reads it."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from PIL import Image

from stp_jax.data.sources import parallel_map

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
TEST_NAMES = ("test", "val", "validation")
_JPEG_END = b"\xff\xd9"
_LISTED = 8  # corrupt files that a message names


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """One scanned file: where it is, its class, and what its header says."""

    path: Path
    class_name: str
    num_bytes: int
    width: int = 0
    height: int = 0
    gray: bool = False
    damage: str = ""  # why it cannot be used; empty for a good file


@dataclass(frozen=True, kw_only=True)
class ImageTree:
    """A scanned tree: the good files of each split, the classes, and how many were left out."""

    classes: tuple[str, ...]
    train: tuple[ImageFile, ...]
    test: tuple[ImageFile, ...]
    skipped: tuple[Path, ...]

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """Good files of both splits."""
        return self.train + self.test

    @property
    def channels(self) -> int:
        """1 where every image is gray, else 3."""
        return 1 if all(file.gray for file in self.files) else 3

    @property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) shared by all images, or None."""
        sizes = {(file.height, file.width) for file in self.files}
        return sizes.pop() if len(sizes) == 1 else None

    def fingerprint(self, root: Path) -> str:
        """Names the content: a hash over the files' relative paths and sizes in bytes."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path.relative_to(root).as_posix()}\0{file.num_bytes}\n".encode())
        return digest.hexdigest()[:12]


def _inspect(path: Path, class_name: str) -> ImageFile:
    """Reads a file's header; decodes it as well unless it is a JPEG whose end is in place."""
    file = ImageFile(path=path, class_name=class_name, num_bytes=path.stat().st_size)
    try:
        if file.num_bytes == 0:
            raise ValueError("the file is empty")
        with path.open("rb") as stream, Image.open(stream) as image:
            width, height = image.size
            if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{width}×{height} pixels are too many to be safe")
            gray = image.mode in ("1", "L")
            stream.seek(-len(_JPEG_END), os.SEEK_END)
            complete = image.format == "JPEG" and stream.read() == _JPEG_END
            stream.seek(0)
            if not complete:
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return replace(file, damage=str(error) or repr(error))
    return replace(file, width=width, height=height, gray=gray)


def _scan_class(folder: Path) -> list[ImageFile]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return [_inspect(path, folder.name) for path in paths]


def _class_folders(split: Path) -> list[Path]:
    return sorted(path for path in split.iterdir() if path.is_dir())


def _split_folders(root: Path) -> tuple[Path, Path]:
    """Finds the two splits; says what the tree should look like where they are not there."""
    layout = "an image folder holds train/CLASS/* and test/CLASS/* (or val/, validation/)"
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; {layout}")
    if not (root / "train").is_dir():
        raise ValueError(f"{root} has no train/; {layout}")
    for name in TEST_NAMES:
        if (root / name).is_dir():
            return root / "train", root / name
    raise ValueError(f"{root} has no {', '.join(f'{name}/' for name in TEST_NAMES)}; {layout}")


def _report(corrupt: Iterable[ImageFile]) -> str:
    corrupt = list(corrupt)
    lines = [f"  {file.path}: {file.damage}" for file in corrupt[:_LISTED]]
    if len(corrupt) > _LISTED:
        lines.append(f"  … and {len(corrupt) - _LISTED} more")
    return "\n".join([f"{len(corrupt)} corrupt images:", *lines])


def scan(root: Path, *, on_corrupt: str = "error") -> ImageTree:
    """Lists the images of a tree, reading every header, so that damage is known before training.

    A JPEG that ends as it should is taken as whole after its header; every other file is decoded
    once. Classes are the folders of train/ in alphabetical order; files of other suffixes are
    passed over.

    Args:
      root: the folder that holds train/ and test/ (or val/, validation/).
      on_corrupt: "error" refuses a tree with corrupt images; "skip" warns and leaves them out.

    Raises:
      ValueError: if a folder is missing or empty, test/ has a class that train/ has not, or
        images are corrupt and `on_corrupt` is "error"; the message counts and names them.
    """
    train, test = _split_folders(root)
    classes = tuple(folder.name for folder in _class_folders(train))
    unknown = [folder.name for folder in _class_folders(test) if folder.name not in classes]
    if unknown:
        raise ValueError(f"{test} has classes that {train} has not: {', '.join(unknown[:_LISTED])}")

    with warnings.catch_warnings():
        # Pillow warns of huge images; here they count as corrupt.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        scanned = {
            split: list(chain(*parallel_map(_scan_class, _class_folders(split))))
            for split in (train, test)
        }
    corrupt = [file for files in scanned.values() for file in files if file.damage]
    if corrupt and on_corrupt == "error":
        raise ValueError(
            f'{_report(corrupt)}\nrepair or remove them, or leave them out with on_corrupt="skip"'
        )
    good = {split: [f for f in files if not f.damage] for split, files in scanned.items()}
    for split, files in good.items():
        if not files:
            raise ValueError(f"{split} has no images ({', '.join(sorted(SUFFIXES))}) in CLASS/")
    without = sorted(set(classes) - {file.class_name for file in good[train]})
    if without:
        raise ValueError(f"{train} has no images of the classes {', '.join(without[:_LISTED])}")
    if corrupt:
        warnings.warn(f"left out {_report(corrupt)}", stacklevel=2)
    return ImageTree(
        classes=classes,
        train=tuple(good[train]),
        test=tuple(good[test]),
        skipped=tuple(file.path for file in corrupt),
    )

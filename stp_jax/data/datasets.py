"""Data sets by name: the embedded digits, image folders, and whatever TFDS has prepared."""

import contextlib
import difflib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from stp_jax.data import digits, folder
from stp_jax.data.sources import FolderSource, MemorySource, Source, TfdsSource, hold_out

# Per-channel statistics of ImageNet's training images in [0, 1], as torchvision's reference
# transforms use them; published weights for RGB images mostly expect these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Where image sizes differ, batches are made at ImageNet's usual size.
DEFAULT_SIZE = (224, 224)

# A split below this many decoded bytes is kept in memory.
MEMORY_LIMIT = 2**30

# TFDS's "test" split of ImageNet has no labels (all are −1): the validation images stand in.
_TEST_SPLITS = {"imagenet2012": "validation"}

_STATISTICS_IMAGES = 2000

# Fraction of the training examples that is held out by default.
VALIDATION = 0.1


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A labelled image data set with its splits; `dataclasses.replace` changes a field."""

    name: str
    version: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (H, W, C) of a batch's images, unless told otherwise
    mean: tuple[float, ...]  # per channel, of pixel values in [0, 1]
    std: tuple[float, ...]
    train: Source
    validation: Source  # held out of training, to choose by
    test: Source
    description: str  # one line for results: what was really read
    uniform: bool = True  # whether every image has the shape `image_shape` as stored
    max_value: int = 255  # pixel value that counts as 1.0
    skipped: tuple[str, ...] = ()  # corrupt files left out

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def _kept(source: Source, image_shape: Sequence[int], uniform: bool) -> Source:
    """Keeps a small split of equally shaped images in memory, from its first use on."""
    small = len(source) * math.prod(image_shape) <= MEMORY_LIMIT
    return MemorySource(source) if uniform and small else source


def _statistics(source: Source, channels: int, max_value: int) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation per channel: ImageNet's for RGB, else measured.

    Measured over at most 2000 training images, evenly spaced.
    """
    if channels == 3:
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    step = max(1, math.ceil(len(source) / _STATISTICS_IMAGES))
    pixels = np.concatenate(
        [source[i]["image"].reshape(-1, channels) for i in range(0, len(source), step)]
    )
    pixels = pixels.astype(np.float64) / max_value
    std = np.maximum(pixels.std(axis=0), 1.0 / max_value)  # a constant channel divides by no zero
    return {"mean": tuple(pixels.mean(axis=0).tolist()), "std": tuple(std.tolist())}


def _describe(
    title: str, splits: Sequence[Source], shape: tuple[int, ...], *, uniform: bool, classes: int
) -> str:
    size = "×".join(map(str, shape)) if uniform else "various sizes"
    train, validation, test = map(len, splits)
    return (
        f"{title}: {train} training, {validation} validation (held out of training) and {test} "
        f"test images, {size}, {classes} classes"
    )


def _assemble(
    *,
    name: str,
    version: str,
    title: str,
    class_names: Sequence[str],
    train: Source,
    test: Source,
    size: tuple[int, int] | None,
    channels: int,
    validation: float,
    max_value: int = 255,
    skipped: tuple[str, ...] = (),
) -> Dataset:
    uniform = size is not None
    shape = (*(size or DEFAULT_SIZE), channels)
    train, held_out = hold_out(_kept(train, shape, uniform), validation)
    splits = (train, held_out, _kept(test, shape, uniform))
    description = _describe(title, splits, shape, uniform=uniform, classes=len(class_names))
    return Dataset(
        name=name,
        version=version,
        class_names=tuple(class_names),
        image_shape=shape,
        **_statistics(train, channels, max_value),
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        description=description + (f", {len(skipped)} corrupt left out" if skipped else ""),
        uniform=uniform,
        max_value=max_value,
        skipped=skipped,
    )


def _load_folder(data_dir: str | Path | None, on_corrupt: str, validation: float) -> Dataset:
    if data_dir is None:
        raise ValueError('data set "folder" needs data_dir, the folder that holds train/ and test/')
    root = Path(data_dir).expanduser()
    tree = folder.scan(root, on_corrupt=on_corrupt)

    def source(files: Sequence[folder.ImageFile]) -> Source:
        labels = [tree.classes.index(file.class_name) for file in files]
        return FolderSource([file.path for file in files], labels, channels=tree.channels)

    return _assemble(
        name="folder",
        version=tree.fingerprint(root),
        title=f"image folder {root.resolve()}",
        class_names=tree.classes,
        train=source(tree.train),
        test=source(tree.test),
        size=tree.common_size,
        channels=tree.channels,
        validation=validation,
        skipped=tuple(path.relative_to(root).as_posix() for path in tree.skipped),
    )


@contextlib.contextmanager
def _no_folders_left() -> Iterator[None]:
    """Removes the temporary folder that TFDS makes for a builder which is not prepared."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def _find_builder(name: str, data_dir: str | Path | None) -> tfds.core.DatasetBuilder:
    try:
        with _no_folders_left():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", "folder", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see tfds.list_builders()"
        raise ValueError(
            f'no data set is called {name!r}, here or in TFDS ("folder" reads '
            f"images from data_dir); {hint}"
        ) from error
    except (AssertionError, ValueError) as error:
        raise ValueError(f"TFDS cannot find {name!r}: {error}") from error


def _check_prepared(builder: tfds.core.DatasetBuilder, data_dir: str | Path | None) -> None:
    """Says how to prepare a data set that is not there, in the one format that is read here."""
    where = f" --data_dir={data_dir}" if data_dir else ""
    command = f"tfds build {builder.name} --file_format=array_record{where}"
    if not builder.is_prepared() or not builder.info.splits:
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        first = f"\nfirst, by hand: {manual.strip()}" if manual else ""
        raise ValueError(
            f"{builder.name} is not prepared in {builder.data_dir}; prepare it once with "
            f"TensorFlow installed (pip install 'stp-jax[tensorflow]'):\n  {command}{first}"
        )
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_dir} holds {builder.info.file_format.value} files, which have no "
            f"random access; prepare the data set again:\n  {command} --overwrite"
        )


def _supervised(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the names of the image and label features of an image classification data set."""
    keys = info.supervised_keys
    if keys is not None and len(keys) == 2:
        image, label = (info.features[key] for key in keys)
        is_image = image is not None and len(image.shape or ()) == 3 and image.np_dtype == np.uint8
        if is_image and isinstance(label, tfds.features.ClassLabel):
            return keys
    raise ValueError(
        f"{info.name} is not an image classification data set: supervised features must be a uint8 "
        f"image and a class label, got {keys} of {info.features}"
    )


def _load_tfds(
    builder: tfds.core.DatasetBuilder,
    *,
    validation: float,
    max_value: int = 255,
    title: str | None = None,
) -> Dataset:
    info = builder.info
    image_key, label_key = _supervised(info)
    test = _TEST_SPLITS.get(builder.name, "test" if "test" in info.splits else "validation")
    missing = {"train", test} - set(info.splits)
    if missing:
        raise ValueError(
            f"{info.name} has no {' and no '.join(sorted(missing))} split, only "
            f"{', '.join(info.splits)}"
        )

    def source(split: str) -> Source:
        return TfdsSource(builder.as_data_source(split), image_key=image_key, label_key=label_key)

    height, width, channels = info.features[image_key].shape
    return _assemble(
        name=builder.name,
        version=str(builder.version),
        title=title or f"TFDS {info.full_name}",
        class_names=info.features[label_key].names,
        train=source("train"),
        test=source(test),
        size=(height, width) if height and width else None,
        channels=channels,
        validation=validation,
        max_value=max_value,
    )


def load(
    name: str = "digits",
    *,
    data_dir: str | Path | None = None,
    on_corrupt: str = "error",
    validation: float = VALIDATION,
) -> Dataset:
    """Opens a data set; nothing is downloaded.

    Splits of equally shaped images below 1 GiB are decoded once, at their first use, and kept in
    memory; others are decoded again in each epoch.

    Args:
      name: "digits" (embedded; written once to `data_dir`, a folder of TFDS data sets), "folder"
        (the tree train/CLASS/*, test/CLASS/* at `data_dir`; val/ and validation/ also serve as
        test/), or any image classification data set that TFDS has prepared as array_record.
      data_dir: where the data is; by default TFDS's own folder (`TFDS_DATA_DIR`, or
        ~/tensorflow_datasets).
      on_corrupt: what to do about corrupt images of a folder: "error", or "skip" with a warning.
      validation: fraction of the training images that is held out, to choose by: always the same
        ones, class by class where labels are known without decoding every image.

    Returns:
      The data set. RGB images come with ImageNet's mean and standard deviation, others with those
      of their training images.

    Raises:
      ValueError: if the data set is unknown or not there (saying how to get it), is not an image
        classification data set, holds corrupt images, or `validation` is not in [0, 1).
    """
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f'on_corrupt must be "error" or "skip", got {on_corrupt!r}')
    if name == "folder":
        return _load_folder(data_dir, on_corrupt, validation)
    if name == "digits":
        return _load_tfds(
            digits.prepared_digits(data_dir),
            validation=validation,
            max_value=digits.MAX_VALUE,
            title="scikit-learn's handwritten digits",
        )
    builder = _find_builder(name, data_dir)
    _check_prepared(builder, data_dir)
    return _load_tfds(builder, validation=validation)

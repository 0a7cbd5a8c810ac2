"""Batches for training and evaluation, read through grain.

A training step's batch depends on (data set, seed, step) alone: its order and its random numbers
are drawn for the global batch, of which each process reads its share. So the state to checkpoint
is one index, and the examples of a step are the same for any number of processes.

What grain maps are batches, not examples: small images are gathered and augmented in one NumPy call
each, which is three times as fast as one call an example (8×8 digits with shifts, two cores).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from stp_jax.data.augment import AUGMENTATIONS, Size, center_crop
from stp_jax.data.datasets import Dataset
from stp_jax.data.protocol import SPLITS, Batch
from stp_jax.data.sources import Fit, Source

# Batches under way ahead of the training step; a streamed batch decodes in threads of its own.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def _normaliser(dataset: Dataset) -> Callable[[np.ndarray], np.ndarray]:
    """Returns uint8 (N, H, W, C) → float32, (pixel/max_value − mean)/std per channel."""
    scale = 1.0 / (dataset.max_value * np.asarray(dataset.std))
    offset = -np.asarray(dataset.mean) / np.asarray(dataset.std)

    def normalise(images: np.ndarray) -> np.ndarray:
        # Channels tiled along the rows: numpy's inner loop over three channels is 8 times slower.
        count, height, width, _ = images.shape
        rows = images.reshape(count, height, -1)
        result = np.multiply(rows, np.tile(scale, width).astype(np.float32), dtype=np.float32)
        result += np.tile(offset, width).astype(np.float32)
        return result.reshape(images.shape)

    return normalise


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def _check_batching(batch_size: int, shard_index: int, shard_count: int) -> None:
    _check_integer("batch_size", batch_size, 1)
    _check_integer("shard_count", shard_count, 1)
    _check_integer("shard_index", shard_index, 0)
    if shard_index >= shard_count:
        raise ValueError(
            f"shard_index must be below shard_count, got {shard_index} of {shard_count}"
        )
    if batch_size % shard_count:
        raise ValueError(
            f"batch_size {batch_size} (over all processes) must be a multiple of shard_count "
            f"{shard_count}"
        )


def _target_size(dataset: Dataset, image_size: int | Size | None) -> Size:
    if image_size is None:
        return dataset.image_shape[:2]
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    _check_integer("image_size", height, 1)
    _check_integer("image_size", width, 1)
    return height, width


def _center_fit(dataset: Dataset, size: Size) -> Fit | None:
    """The crop that brings stored images to `size`, or None where they have it already."""
    if dataset.uniform and size == dataset.image_shape[:2]:
        return None
    return lambda image, _: center_crop(image, size)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of whole batches in a pass over the training images."""
    return len(dataset.train) // batch_size


def train_iterator(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    augment: str = "none",
    image_size: int | Size | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over shuffled, augmented training batches.

    Every epoch is a new permutation, its incomplete last batch dropped. `get_state` and
    `set_state` (and grain's checkpoint arguments for Orbax) save and restore the position.

    Args:
      dataset: what to read.
      batch_size: examples of a step over all processes.
      seed: of the order and of the augmentation, in [0, 2³²).
      augment: a key of `AUGMENTATIONS`: "none", "shift" (±1 pixel), "cifar" (crop after padding
        by 4, flip) or "imagenet" (random-resized crop, flip).
      image_size: side or (height, width) of the images; by default the data set's.
      shard_index: which share of each batch to read, usually `jax.process_index()`.
      shard_count: number of shares, usually `jax.process_count()`.
      num_epochs: passes over the data; None goes on for ever.

    Returns:
      An iterator over {"input": float32 (batch_size/shard_count, H, W, C), normalised,
      "label": int32 (batch_size/shard_count,)}.

    Raises:
      ValueError: if an argument is out of its range or the batch is larger than the data.
    """
    _check_batching(batch_size, shard_index, shard_count)
    if batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size {batch_size} is more than the {len(dataset.train)} training images"
        )
    _check_integer("seed", seed, 0)
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2³², got {seed}")
    if num_epochs is not None:
        _check_integer("num_epochs", num_epochs, 1)
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment!r}")
    size, augmentation = _target_size(dataset, image_size), AUGMENTATIONS[augment]
    center, normalise = _center_fit(dataset, size), _normaliser(dataset)
    dataset.train.warm()

    def read(indices: np.ndarray, rng: np.random.Generator) -> Batch:
        uniform = rng.random((batch_size, augmentation.draws))[shard_index::shard_count]
        fit, crop = center, augmentation.fit
        if crop is not None:
            fit = lambda image, position: crop(image, size, uniform[position])  # noqa: E731
        images, labels = dataset.train.fetch(indices[shard_index::shard_count], fit)
        if augmentation.batch is not None:
            images = augmentation.batch(images, uniform)
        return {"input": normalise(images), "label": labels}

    batches = (
        grain.MapDataset.range(len(dataset.train))
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat(num_epochs)
        .random_map(read)
    )
    return iter(batches.to_iter_dataset(READ_OPTIONS))


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int | Size | None = None,
    split: str = "test",
    indices: np.ndarray | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Iterates once over a split in order, every example exactly once over all processes.

    The last batch is filled up with repetitions of the last example whose mask is 0, so that a
    compiled step sees one shape, and every process the same number of steps.

    Args:
      dataset: what to read.
      batch_size: examples of a step over all processes.
      image_size: side or (height, width) of the images, cut from the middle; by default the data
        set's.
      split: "test", "validation" or "train" (without augmentation).
      indices: which examples, in this order; all of the split by default.
      shard_index: which share of each batch to read.
      shard_count: number of shares.

    Returns:
      An iterator over {"input": float32 (B, H, W, C), "label": int32 (B,), "mask": float32 (B,)}
      with B = batch_size/shard_count.

    Raises:
      ValueError: if an argument is out of its range.
    """
    _check_batching(batch_size, shard_index, shard_count)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    source: Source = getattr(dataset, split)
    chosen = np.arange(len(source)) if indices is None else indices
    fit = _center_fit(dataset, _target_size(dataset, image_size))
    normalise = _normaliser(dataset)
    source.warm()

    def read(step: int) -> dict[str, Any]:
        positions = np.arange(step * batch_size + shard_index, (step + 1) * batch_size, shard_count)
        images, labels = source.fetch(chosen[np.minimum(positions, len(chosen) - 1)], fit)
        mask = (positions < len(chosen)).astype(np.float32)
        return {"input": normalise(images), "label": labels, "mask": mask}

    steps = -(-len(chosen) // batch_size)
    return iter(grain.MapDataset.range(steps).map(read).to_iter_dataset(READ_OPTIONS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of images as training reads it; a `stp_jax.data.TrainingData`."""

    dataset: Dataset
    augment: str = "none"  # of training images; a key of `AUGMENTATIONS`
    image_size: int | Size | None = None  # side or (height, width); None keeps the data set's

    @property
    def name(self) -> str:
        """Short name."""
        return self.dataset.name

    @property
    def description(self) -> str:
        """One line for results: what was really read."""
        return self.dataset.description

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.dataset.num_classes

    @property
    def train(self) -> Source:
        """The training images."""
        return self.dataset.train

    @property
    def validation(self) -> Source:
        """The images held out of training, to choose by."""
        return self.dataset.validation

    @property
    def test(self) -> Source:
        """The test images."""
        return self.dataset.test

    def example_input(self) -> jax.ShapeDtypeStruct:
        """The shape of one image, (1, H, W, C)."""
        size = _target_size(self.dataset, self.image_size)
        return jax.ShapeDtypeStruct((1, *size, self.dataset.image_shape[2]), np.float32)

    def model_options(self) -> dict[str, Any]:
        """Channels, values and side of an image."""
        _, height, width, channels = self.example_input().shape
        return {
            "in_channels": channels,
            "in_features": height * width * channels,
            "image_size": height,
        }

    def train_batches(
        self, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
    ) -> grain.DatasetIterator[Batch]:
        """As `train_iterator`."""
        return train_iterator(
            self.dataset,
            batch_size=batch_size,
            seed=seed,
            augment=self.augment,
            image_size=self.image_size,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        split: str = "test",
        indices: np.ndarray | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> Iterator[Batch]:
        """As the function `eval_batches`."""
        return eval_batches(
            self.dataset,
            batch_size=batch_size,
            image_size=self.image_size,
            split=split,
            indices=indices,
            shard_index=shard_index,
            shard_count=shard_count,
        )

"""Random-access sources of labelled uint8 images: an image folder, a TFDS split, memory."""

import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

# (image, its position in the fetch) → image; runs beside the decoding, one example at a time.
Fit = Callable[[np.ndarray, int], np.ndarray]
In = TypeVar("In")
Out = TypeVar("Out")


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="stp_jax.data")


def parallel_map(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """Maps `function` over `items` in the process's pool of decoding threads, in order."""
    return list(_pool().map(function, items))


class Source(ABC):
    """Labelled images by index: `source[i]` is {"image": uint8 (H, W, C), "label": int32}."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example."""

    @property
    def known_labels(self) -> np.ndarray | None:
        """(N,) int32 labels, or None where they are only known by reading every example."""
        return None

    def warm(self) -> None:  # noqa: B027  # most sources keep nothing
        """Decodes now what will be kept, so that damage shows before training."""

    def fetch(self, indices: np.ndarray, fit: Fit | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads many examples.

        Args:
          indices: (N,) int.
          fit: brings each image to one common shape; None where they all have it.

        Returns:
          uint8 images (N, H, W, C) and int32 labels (N,).
        """

        def read(positions: np.ndarray) -> list[tuple[np.ndarray, int]]:
            examples = [self[int(indices[position])] for position in positions]
            return [
                (fit(example["image"], int(at)) if fit else example["image"], example["label"])
                for at, example in zip(positions, examples, strict=True)
            ]

        # A few runs of examples to a thread: handing over single small images costs more than
        # decoding them.
        runs = np.array_split(np.arange(len(indices)), min(len(indices), 4 * (os.cpu_count() or 1)))
        examples = [example for run in parallel_map(read, runs) for example in run]
        images, labels = zip(*examples, strict=True)
        return np.stack(images), np.asarray(labels, np.int32)


class FolderSource(Source):
    """Image files, decoded by Pillow at each access."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], *, channels: int):
        """Takes one label per path; images become gray (1 channel) or RGB (3)."""
        self.paths, self.labels = tuple(paths), np.asarray(labels, np.int32)
        self._mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    @property
    def known_labels(self) -> np.ndarray:
        """Labels by folder."""
        return self.labels

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one image; a damaged file raises a ValueError that names it."""
        try:
            with Image.open(self.paths[index]) as file:
                pixels = np.asarray(file.convert(self._mode))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.paths[index]} cannot be decoded: {error}") from error
        return {"image": np.atleast_3d(pixels), "label": self.labels[index]}


class TfdsSource(Source):
    """A split of a TFDS data set, decoded at each access."""

    def __init__(self, data_source: Any, *, image_key: str, label_key: str):
        """Takes a TFDS data source and the names of its image and label features."""
        self._source, self._keys = data_source, (image_key, label_key)

    def __len__(self) -> int:
        """Number of examples in the split."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads and decodes one record."""
        example = self._source[index]
        image, label = (example[key] for key in self._keys)
        return {"image": image, "label": np.int32(label)}


class MemorySource(Source):
    """Another source of equally shaped images, decoded once at its first use and then kept."""

    def __init__(self, source: Source):
        """Wraps `source`; nothing is read yet."""
        self._source = source
        self._lock = threading.Lock()
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All uint8 images (N, H, W, C) and int32 labels (N,)."""
        with self._lock:
            if self._arrays is None:
                self._arrays = self._source.fetch(np.arange(len(self._source)))
            return self._arrays

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source)

    @property
    def known_labels(self) -> np.ndarray:
        """Labels, of the source if it knows them, else from memory."""
        known = self._source.known_labels
        return self.arrays[1] if known is None else known

    def warm(self) -> None:
        """Decodes all images."""
        _ = self.arrays

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example, from memory."""
        images, labels = self.arrays
        return {"image": images[index], "label": labels[index]}

    def fetch(self, indices: np.ndarray, fit: Fit | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gathers examples from memory, in one step where they need no fitting."""
        if fit is not None:
            return super().fetch(indices, fit)
        images, labels = self.arrays
        return images[indices], labels[indices]


class SubsetSource(Source):
    """Some examples of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        """Takes the indices (N,) of the examples, in their order."""
        self._source, self._indices = source, np.asarray(indices)

    def __len__(self) -> int:
        """Number of examples chosen."""
        return len(self._indices)

    @property
    def known_labels(self) -> np.ndarray | None:
        """Labels of the examples chosen, where the source knows them."""
        known = self._source.known_labels
        return None if known is None else known[self._indices]

    def warm(self) -> None:
        """Decodes what the source keeps."""
        self._source.warm()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example."""
        return self._source[int(self._indices[index])]

    def fetch(self, indices: np.ndarray, fit: Fit | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads many examples from the source in one call."""
        return self._source.fetch(self._indices[indices], fit)


def hold_out(source: Source, fraction: float, *, seed: int = 0) -> tuple[Source, Source]:
    """Divides a source in two: what stays, and a random part of it that is held out.

    Each class gives its share where labels are known without reading every example (folders, and
    sets that are kept in memory); elsewhere the part is drawn from all examples alike.

    Args:
      source: the examples.
      fraction: of them to hold out, in [0, 1).
      seed: of the draw.

    Returns:
      (what stays, what is held out), each in the order of the source. A class with one example
      keeps it.

    Raises:
      ValueError: the fraction is out of its range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"a fraction from 0 to below 1 can be held out, got {fraction}")
    if fraction == 0:
        return source, SubsetSource(source, np.arange(0))
    labels = source.known_labels
    labels = np.zeros(len(source), np.int32) if labels is None else labels
    rng = np.random.default_rng(seed)
    held = np.zeros(len(source), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
    return tuple(SubsetSource(source, np.flatnonzero(chosen)) for chosen in (~held, held))  # type: ignore[return-value]

"""Text for language models: Python's own language reference, which every installation carries.

CPython's module `pydoc_data.topics` holds the topics of ``help()`` as plain text (466 thousand
characters in Python 3.11). It is cut into windows of characters, each predicting the next one.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from stp_jax.data.datasets import VALIDATION
from stp_jax.data.pipeline import READ_OPTIONS
from stp_jax.data.protocol import Batch

TEXT = "python_docs"  # the name of the data
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))  # line feed and printable ASCII
TEST_EVERY = 10  # every tenth run of characters is for testing
_RUN = 4096  # characters; long enough that few windows end at a border


@dataclass(frozen=True, kw_only=True)
class TextDataset:
    """Windows of characters and what follows them; a `stp_jax.data.TrainingData`.

    Characters are indices of `VOCABULARY`; an example's label is the next character of each.
    """

    name: str
    version: str
    window: int  # characters that a model reads at once
    train: np.ndarray  # uint8 (N, window + 1)
    validation: np.ndarray  # held out of training, to choose by
    test: np.ndarray
    description: str  # one line for results: what was really read

    @property
    def num_classes(self) -> int:
        """Size of the vocabulary."""
        return len(VOCABULARY)

    def example_input(self) -> jax.ShapeDtypeStruct:
        """The shape of one window, (1, window)."""
        return jax.ShapeDtypeStruct((1, self.window), np.int32)

    def model_options(self) -> dict[str, Any]:
        """Nothing beside the vocabulary."""
        return {}

    def train_batches(
        self, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
    ) -> grain.DatasetIterator[Batch]:
        """Shuffled training windows for ever; the position can be saved and restored.

        Returns:
          An iterator over {"input": int32 (B, window), "label": int32 (B, window)} with
          B = batch_size/shard_count.
        """

        def read(indices: np.ndarray) -> Batch:
            return _example(self.train[indices[shard_index::shard_count]])

        batches = (
            grain.MapDataset.range(len(self.train))
            .seed(seed)
            .shuffle()
            .batch(batch_size, drop_remainder=True)
            .repeat()
            .map(read)
        )
        return iter(batches.to_iter_dataset(READ_OPTIONS))

    def eval_batches(
        self,
        *,
        batch_size: int,
        split: str = "test",
        indices: np.ndarray | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> Iterator[Batch]:
        """A split once, in order or as the indices say, with a mask as images have it."""
        windows: np.ndarray = getattr(self, split)
        windows = windows if indices is None else windows[indices]
        for start in range(0, len(windows), batch_size):
            positions = np.arange(start + shard_index, start + batch_size, shard_count)
            batch = _example(windows[np.minimum(positions, len(windows) - 1)])
            yield {**batch, "mask": (positions < len(windows)).astype(np.float32)}


def _example(windows: np.ndarray) -> Batch:
    return {"input": windows[:, :-1].astype(np.int32), "label": windows[:, 1:].astype(np.int32)}


def encode_text(text: str) -> np.ndarray:
    """The indices in `VOCABULARY` of a text's characters, uint8; others are left out.

    >>> encode_text("a\\nß!").tolist()
    [66, 0, 2]
    """
    index = {character: i for i, character in enumerate(VOCABULARY)}
    return np.array([index[c] for c in text if c in index], np.uint8)


def _windows(run: np.ndarray, window: int) -> np.ndarray:
    """(n, window + 1): windows that overlap by the one character that each one predicts last."""
    count = (len(run) - 1) // window
    starts = np.arange(count)[:, np.newaxis] * window
    return run[starts + np.arange(window + 1)[np.newaxis, :]]


def load_text(*, window: int = 64, validation: float = VALIDATION) -> TextDataset:
    """Cuts Python's language reference into windows of characters.

    Every tenth run of 4096 characters, from the first, goes to the test split, and some of the
    others to the validation split, so that no window of one split overlaps one of another.

    Args:
      window: characters that a model reads at once, from 1 to 4095.
      validation: fraction of the other runs that is held out: always the same ones.

    Raises:
      ValueError: if an argument is out of range.
    """
    if not 1 <= window < _RUN:
        raise ValueError(f"window must be from 1 to {_RUN - 1} characters, got {window}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a fraction from 0 to below 1, got {validation}")
    from pydoc_data.topics import topics  # type: ignore[import-not-found]  # not in typeshed

    text = encode_text("\n\n".join(topics[key] for key in sorted(topics)))
    runs = np.split(text, range(_RUN, len(text), _RUN))

    def split(indices: np.ndarray) -> np.ndarray:
        none = np.zeros((0, window + 1), np.uint8)
        return np.concatenate([none, *(_windows(runs[i], window) for i in sorted(indices))])

    tested = np.arange(0, len(runs), TEST_EVERY)
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(runs)), tested))
    held_out = round(validation * len(others))
    train, test = split(others[held_out:]), split(tested)
    held = split(others[:held_out])
    return TextDataset(
        name=TEXT,
        version=platform.python_version(),
        window=window,
        train=train,
        validation=held,
        test=test,
        description=f"Python {platform.python_version()}'s language reference: {len(train)} "
        f"training, {len(held)} validation (held out of training) and {len(test)} test windows of "
        f"{window} characters, {len(VOCABULARY)} classes",
    )

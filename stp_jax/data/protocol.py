"""The data protocol: what training and evaluation ask of a data set, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]
SPLITS = ("train", "validation", "test")


class TrainingData(Protocol):
    """Examples of a training, a validation and a test split, in batches.

    Every choice is made on the validation split, which is held out of training; the test split is
    for the figures that are reported.

    A batch is a dictionary of arrays with the examples along the first axis: ``input`` (what the
    model is called on), ``label`` (int32), and in evaluation ``mask`` (float32, 0 for repetitions
    that fill the last batch up). `ImageData` and `TextDataset` are such data; another kind is a
    class with these names.
    """

    @property
    def name(self) -> str:
        """Short name."""

    @property
    def description(self) -> str:
        """One line for results: what was really read."""

    @property
    def num_classes(self) -> int:
        """Outputs of a classifier; of a language model, its vocabulary."""

    @property
    def train(self) -> Sized:
        """The training examples, of which only the number is asked."""

    @property
    def validation(self) -> Sized:
        """The examples held out of training, likewise; there may be none."""

    @property
    def test(self) -> Sized:
        """The test examples, likewise."""

    def example_input(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one input, with a batch axis of 1."""

    def model_options(self) -> dict[str, Any]:
        """Options of models that follow from the data, by name."""

    def train_batches(
        self, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
    ) -> grain.DatasetIterator[Batch]:
        """Batches for ever, in an order that depends on the seed; the position can be saved.

        Args:
          batch_size: examples of a step over all shards.
          seed: of the order and the augmentation, in [0, 2³²).
          shard_index: which share of each batch to read.
          shard_count: number of shares.
        """

    def eval_batches(
        self,
        *,
        batch_size: int,
        split: str = "test",
        indices: np.ndarray | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> Iterator[Batch]:
        """Examples of a split once, without augmentation.

        Args:
          batch_size: examples of a step over all shards.
          split: one of `SPLITS`.
          indices: which examples, in this order; all of the split by default.
          shard_index: which share of each batch to read.
          shard_count: number of shares.
        """

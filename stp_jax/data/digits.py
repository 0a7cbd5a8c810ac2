"""The handwritten digits that scikit-learn carries, as a TFDS builder: the embedded default.

1797 images of 8×8 pixels with values 0 … 16 in ten classes (Alpaydin and Kaynak, "Optical
recognition of handwritten digits", UCI machine learning repository, 1998, its test part).
Preparing needs neither network nor TensorFlow.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

MAX_VALUE = 16  # a pixel counts the dark points of a 4×4 block
TEST_EVERY = 5


class _LocalInfo(tfds.core.DatasetInfo):
    """Information that comes with the builder."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS would look for it on a server and leave a temporary folder behind."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of 1437 training and 360 test images.

    The split is fixed: with the examples in order of class (and, within a class, in the order of
    the source), every fifth one, from the first, goes to the test split. So every class has a
    fifth of its examples there, to within one.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            description="scikit-learn's handwritten digits",
            # Image features encode through TensorFlow; a plain tensor does not.
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, Any]]:
        # Half the import time of this package, and needed once.
        from sklearn.datasets import load_digits

        digits = load_digits()
        by_class = np.argsort(digits.target, kind="stable")
        in_test = np.arange(len(by_class)) % TEST_EVERY == 0
        for index in by_class[in_test == test]:
            image = digits.images[index].astype(np.uint8)[..., np.newaxis]
            yield int(index), {"image": image, "label": int(digits.target[index])}


def prepared_digits(data_dir: str | Path | None = None) -> Digits:
    """Returns the builder with its files in place, writing them first where they are missing.

    Args:
      data_dir: folder of TFDS data sets; by default TFDS's own (`TFDS_DATA_DIR`, or
        ~/tensorflow_datasets).

    Raises:
      ValueError: if the folder cannot be written.
    """

    def builder() -> Digits:
        return Digits(data_dir=data_dir, file_format="array_record")

    digits = builder()
    if digits.data_path.exists():
        return digits
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            digits.download_and_prepare()
    except OSError as error:
        # TFDS renames a finished folder into place; another process may have been first.
        digits = builder()
        if not digits.data_path.exists():
            raise ValueError(
                f"cannot write the digits to {digits.data_dir} ({error}); give a writable "
                "data_dir or set TFDS_DATA_DIR"
            ) from error
    return digits

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from stp_jax import data
from stp_jax.data.digits import prepared_digits


def everything(source):
    return source.fetch(np.arange(len(source)))


def test_the_splits_hold_every_digit_once(digits):
    splits = (digits.train, digits.validation, digits.test)
    images, labels = (np.concatenate(parts) for parts in zip(*map(everything, splits), strict=True))
    original = load_digits()

    def multiset(pixels, targets):
        rows = np.column_stack([pixels.reshape(len(pixels), -1), targets]).astype(np.int64)
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(
        multiset(images, labels), multiset(original.images, original.target)
    )


def test_split_is_a_stratified_fifth(digits):
    assert len(digits.train) + len(digits.validation) == 1437
    assert len(digits.test) == 360
    per_class = np.bincount(load_digits().target)
    in_test = np.bincount(everything(digits.test)[1], minlength=10)
    assert np.all(np.abs(in_test - per_class / 5) <= 1)


def test_statistics_are_those_of_the_training_pixels(digits):
    pixels = everything(digits.train)[0] / 16.0
    np.testing.assert_allclose(digits.mean, pixels.mean(), rtol=1e-12)
    np.testing.assert_allclose(digits.std, pixels.std(), rtol=1e-12)


def test_preparing_twice_gives_the_same_records(digits, tmp_path):
    again = data.load("digits", data_dir=tmp_path)
    for mine, other in zip(everything(digits.test), everything(again.test), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_processes_that_prepare_at_once_all_succeed(tmp_path):
    program = (
        "import sys; from stp_jax.data.digits import prepared_digits; "
        "print(len(prepared_digits(sys.argv[1]).as_data_source('train')))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == [b"1437"] * 3


def test_tensorflow_is_not_needed(digits):
    assert len(digits.test) == 360
    assert "tensorflow" not in sys.modules


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write the digits to .*file"):
        prepared_digits(tmp_path / "file")

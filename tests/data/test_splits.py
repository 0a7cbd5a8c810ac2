"""The validation split: held out by class, always the same, and disjoint from the others."""

import numpy as np
import pytest

from stp_jax import data
from stp_jax.data.sources import FolderSource, Source, SubsetSource, hold_out


def labelled(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return FolderSource([f"{i}.png" for i in range(len(labels))], labels, channels=1)


def parts(source, fraction, seed=0):
    stays, held = hold_out(source, fraction, seed=seed)
    return stays._indices, held._indices


def test_every_class_gives_its_share_and_keeps_one():
    source = labelled([40, 20, 10, 1])
    stays, held = hold_out(source, 0.2)
    assert np.bincount(held.known_labels, minlength=4).tolist() == [8, 4, 2, 0]
    assert np.bincount(stays.known_labels).tolist() == [32, 16, 8, 1]


def test_parts_are_disjoint_complete_and_drawn_at_random():
    source = labelled([200, 200])
    stays, held = parts(source, 0.25)
    assert sorted([*stays, *held]) == list(range(400))
    assert not np.array_equal(held[:50], np.arange(50))
    np.testing.assert_array_equal(held, parts(source, 0.25)[1])
    assert not np.array_equal(held, parts(source, 0.25, seed=1)[1])


def test_labels_that_need_reading_are_not_asked_for():
    class Costly(Source):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            raise AssertionError("an example was read")

    stays, held = hold_out(Costly(), 0.1)
    assert (len(stays), len(held)) == (900, 100)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_out_of_range_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction from 0 to below 1"):
        hold_out(labelled([4]), fraction)


def test_a_subset_reads_the_examples_it_names(make_tree):
    whole = data.load("folder", data_dir=make_tree(train=8), validation=0).train
    chosen = SubsetSource(whole, np.array([9, 2]))
    images, labels = chosen.fetch(np.array([1, 0, 1]))
    np.testing.assert_array_equal(images[1], whole[9]["image"])
    np.testing.assert_array_equal(images[0], chosen[1]["image"])
    assert labels.tolist() == [whole[i]["label"] for i in (2, 9, 2)]


def test_data_sets_hold_out_examples_and_say_so(digits, tmp_path):
    assert len(digits.validation) == pytest.approx(0.1 * 1437, abs=5)
    assert f"{len(digits.validation)} validation (held out of training)" in digits.description
    assert np.bincount(digits.validation.known_labels).min() >= 13
    whole = data.load("digits", data_dir=tmp_path, validation=0)
    assert (len(whole.train), len(whole.validation)) == (1437, 0)
    # Held out or not, the test examples are the same.
    for split in (digits, whole):
        batch = next(iter(data.eval_batches(split, batch_size=360)))
        assert batch["mask"].all()
    batches = data.eval_batches(digits, batch_size=50, split="validation")
    assert sum(b["mask"].sum() for b in batches) == len(digits.validation)


def test_no_window_of_text_overlaps_one_of_another_split():
    text = data.load_text(window=400, validation=0.2)
    train, validation, test = (
        {row.tobytes() for row in split} for split in (text.train, text.validation, text.test)
    )
    assert not (train & validation or train & test or validation & test)
    share = len(text.validation) / (len(text.train) + len(text.validation))
    assert share == pytest.approx(0.2, abs=0.03)
    whole = data.load_text(window=400, validation=0)
    assert len(whole.train) == len(text.train) + len(text.validation)
    np.testing.assert_array_equal(whole.test, text.test)

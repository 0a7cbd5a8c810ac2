"""Text: characters come back, labels follow, splits share nothing, training can be resumed."""

import itertools

import numpy as np
import pytest

from stp_jax.data import load_text
from stp_jax.data.text import VOCABULARY, encode_text


@pytest.fixture(scope="module")
def text():
    return load_text(window=32)


def decode(indices):
    return "".join(VOCABULARY[i] for i in indices)


def test_characters_come_back_and_others_are_left_out():
    assert decode(encode_text("def f(x):\n    return ~x\t– “é”")) == "def f(x):\n    return ~x "
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 96


def test_it_is_python_s_language_reference(text):
    joined = decode(text.train[:, :-1].ravel())
    assert all(word in joined for word in ("statement", "expression", "__init__"))
    assert len(text.train) + len(text.test) > 10_000
    assert f"{len(text.train)} training" in text.description
    assert f"{len(text.test)} test windows" in text.description


def test_labels_are_the_next_characters(text):
    batch = next(iter(text.eval_batches(batch_size=4)))
    np.testing.assert_array_equal(batch["input"][:, 1:], batch["label"][:, :-1])
    # A window ends with the character that the next one starts with.
    np.testing.assert_array_equal(text.test[:100, -1], text.test[1:101, 0])


def test_no_test_window_is_in_the_training_split(text):
    train = {row.tobytes() for row in load_text(window=400).train}
    assert not any(row.tobytes() in train for row in load_text(window=400).test)
    assert 0.08 < len(text.test) / (len(text.train) + len(text.test)) < 0.12


@pytest.mark.parametrize("shards", [1, 2])
def test_evaluation_sees_every_window_once(text, shards):
    seen = []
    for index in range(shards):
        batches = text.eval_batches(batch_size=128, shard_index=index, shard_count=shards)
        for batch in batches:
            seen += [
                row.tobytes() for row, m in zip(batch["input"], batch["mask"], strict=True) if m
            ]
    expected = [row[:-1].astype(np.int32).tobytes() for row in text.test]
    assert sorted(seen) == sorted(expected)


def test_training_order_is_the_seed_s_and_can_be_resumed(text):
    first = text.train_batches(batch_size=8, seed=3)
    a, b = next(first), next(first)
    state = first.get_state()
    c = next(first)
    again = text.train_batches(batch_size=8, seed=3)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["input"], c["input"])
    other = next(text.train_batches(batch_size=8, seed=4))
    assert not np.array_equal(other["input"], a["input"])
    halves = [
        next(text.train_batches(batch_size=8, seed=3, shard_index=i, shard_count=2))
        for i in range(2)
    ]
    np.testing.assert_array_equal(a["input"][0::2], halves[0]["input"])
    np.testing.assert_array_equal(a["input"][1::2], halves[1]["input"])
    assert not np.array_equal(a["input"], b["input"])


def test_an_epoch_is_a_permutation(text):
    steps = len(text.train) // 512
    batches = itertools.islice(text.train_batches(batch_size=512, seed=0), steps)
    seen = np.concatenate([batch["input"] for batch in batches])
    windows, counts = np.unique(text.train[:, :-1], axis=0, return_counts=True)
    found, times = np.unique(seen, axis=0, return_counts=True)
    index = {row.tobytes(): n for row, n in zip(windows.astype(np.int32), counts, strict=True)}
    assert all(n <= index[row.tobytes()] for row, n in zip(found, times, strict=True))


@pytest.mark.parametrize("window", [0, 4096])
def test_windows_out_of_range_are_named(window):
    with pytest.raises(ValueError, match="window must be from 1 to 4095"):
        load_text(window=window)

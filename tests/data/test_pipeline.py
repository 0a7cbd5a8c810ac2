import dataclasses
import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stp_jax import data


@pytest.fixture(scope="module")
def tagged(digits):
    """Digits normalised by (x − 0)/1, so that batches hold the stored pixels divided by 16."""
    return dataclasses.replace(digits, mean=(0.0,), std=(1.0,))


def keys(images):
    """One hashable per image."""
    return [image.tobytes() for image in images]


def collect(iterator):
    return {name: np.concatenate(parts) for name, parts in _columns(list(iterator)).items()}


def _columns(batches):
    return {name: [batch[name] for batch in batches] for name in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_an_epoch_reads_each_image_at_most_once_in_another_order_each_time(tagged):
    steps = data.steps_per_epoch(tagged, 100)
    assert steps == len(tagged.train) // 100 == 12
    iterator = data.train_iterator(tagged, batch_size=100, seed=3, num_epochs=2)
    epochs = [collect(itertools.islice(iterator, steps)) for _ in range(2)]
    with pytest.raises(StopIteration):
        next(iterator)
    pixels, _ = tagged.train.fetch(np.arange(len(tagged.train)))
    available = keys((pixels / 16.0).astype(np.float32))
    for epoch in epochs:
        assert len(set(keys(epoch["input"]))) == 1200
        assert set(keys(epoch["input"])) <= set(available)
    assert keys(epochs[0]["input"]) != keys(epochs[1]["input"])


def test_batches_are_normalised_float32(digits):
    number = len(digits.train)
    batch = next(data.train_iterator(digits, batch_size=number, seed=0))
    assert batch["input"].shape == (number, 8, 8, 1)
    assert (batch["input"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(batch["input"].mean(), 0.0, atol=1e-4)
    np.testing.assert_allclose(batch["input"].std(), 1.0, atol=1e-4)


def test_normalisation_is_per_channel(make_tree):
    dataset = data.load("folder", data_dir=make_tree())
    batch = next(data.eval_batches(dataset, batch_size=6))
    stored = dataset.test.fetch(np.arange(6))[0] / 255
    expected = (stored - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(batch["input"], expected, atol=1e-5)


def test_seed_alone_decides_the_batches(digits):
    def run(seed):
        iterator = data.train_iterator(digits, batch_size=64, seed=seed, augment="shift")
        return collect(itertools.islice(iterator, 5))

    assert_same(run(7), run(7))
    assert keys(run(7)["input"]) != keys(run(8)["input"])


def test_augmentation_moves_by_one_pixel(tagged):
    plain = data.train_iterator(tagged, batch_size=200, seed=1)
    moved = data.train_iterator(tagged, batch_size=200, seed=1, augment="shift")
    plain, moved = next(plain)["input"], next(moved)["input"]
    padded = np.pad(plain, ((0, 0), (1, 1), (1, 1), (0, 0)))
    offsets = [(y, x) for y in range(3) for x in range(3)]
    matches = np.stack(
        [np.all(moved == padded[:, y : y + 8, x : x + 8], axis=(1, 2, 3)) for y, x in offsets]
    )
    assert np.all(matches.any(axis=0))
    assert np.all(matches.any(axis=1))


@pytest.mark.parametrize("stop", [0, 1, 21, 23])
def test_restored_state_continues_exactly(digits, stop):
    """The stops are at the start, inside the first epoch (22 steps), and on either side of it."""

    def new():
        return data.train_iterator(digits, batch_size=64, seed=5, augment="shift")

    reference = new()
    for _ in range(stop):
        next(reference)
    state = reference.get_state()
    following = collect(itertools.islice(reference, 4))
    restored = new()
    next(restored)
    restored.set_state(state)
    assert_same(collect(itertools.islice(restored, 4)), following)


def test_orbax_saves_and_restores_the_position(digits, tmp_path):
    iterator = data.train_iterator(digits, batch_size=64, seed=5)
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        saved = grain.checkpoint.CheckpointSave(iterator)
        manager.save(3, args=ocp.args.Composite(data=saved))
        manager.wait_until_finished()
        expected = next(iterator)
        other = data.train_iterator(digits, batch_size=64, seed=5)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
        assert_same(next(other), expected)


@pytest.mark.parametrize("shards", [2, 4])
def test_shares_of_the_processes_make_up_the_global_batch(digits, shards):
    options = {"batch_size": 64, "seed": 2, "augment": "shift"}
    whole = collect(itertools.islice(data.train_iterator(digits, **options), 3))
    parts = [
        collect(
            itertools.islice(
                data.train_iterator(digits, **options, shard_index=i, shard_count=shards), 3
            )
        )
        for i in range(shards)
    ]
    for index, part in enumerate(parts):
        assert_same(part, {name: value[index::shards] for name, value in whole.items()})


@pytest.mark.parametrize(("batch_size", "shards"), [(7, 1), (360, 1), (1000, 1), (50, 2), (356, 4)])
def test_evaluation_sees_each_example_once(tagged, batch_size, shards):
    parts = [
        list(data.eval_batches(tagged, batch_size=batch_size, shard_index=i, shard_count=shards))
        for i in range(shards)
    ]
    assert len({len(part) for part in parts}) == 1
    shapes = {batch["input"].shape for part in parts for batch in part}
    assert shapes == {(batch_size // shards, 8, 8, 1)}
    counted = [collect(part) for part in parts]
    real = [part["input"][part["mask"] == 1] for part in counted]
    assert sum(len(images) for images in real) == 360
    expected = (tagged.test.fetch(np.arange(360))[0] / 16.0).astype(np.float32)
    assert sorted(keys(np.concatenate(real))) == sorted(keys(expected))


def test_evaluation_in_one_process_keeps_the_order(digits):
    batches = collect(data.eval_batches(digits, batch_size=100))
    labels = digits.test.fetch(np.arange(360))[1]
    np.testing.assert_array_equal(batches["label"][batches["mask"] == 1], labels)


def test_images_of_another_size_are_resized(make_tree):
    dataset = data.load("folder", data_dir=make_tree())
    for iterator in (
        data.train_iterator(dataset, batch_size=2, seed=0, image_size=12, augment="cifar"),
        data.eval_batches(dataset, batch_size=2, image_size=(12, 12)),
    ):
        assert next(iterator)["input"].shape == (2, 12, 12, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": -4}, "at least 1, got -4"),
        ({"batch_size": 64.0}, "at least 1, got 64.0"),
        ({"batch_size": "64"}, "at least 1, got '64'"),
        ({"batch_size": 1438}, "is more than the .* training images"),
        ({"batch_size": 10, "shard_count": 3}, "multiple of shard_count 3"),
        ({"shard_count": 2, "shard_index": 2}, "got 2 of 2"),
        ({"shard_index": -1}, "shard_index must be an integer of at least 0, got -1"),
        ({"augment": "shfit"}, "none, shift, cifar, imagenet"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 2**32}, "seed must be below"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": (8, 0)}, "image_size must be"),
        ({"image_size": [8, 8]}, "image_size must be"),
    ],
)
def test_train_iterator_refuses_bad_arguments(digits, options, message):
    with pytest.raises(ValueError, match=message):
        data.train_iterator(digits, **{"batch_size": 64, "seed": 0, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "at least 1"), ({"split": "valid"}, "one of train, validation, test")],
)
def test_eval_batches_refuses_bad_arguments(digits, options, message):
    with pytest.raises(ValueError, match=message):
        data.eval_batches(digits, **{"batch_size": 64, **options})

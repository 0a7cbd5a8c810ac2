"""NaN and infinity: the step and the layer are named, and no such state is saved."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from experiments import configs, train
from experiments.config import override
from experiments.context import Context, make_model
from experiments.runtime import finite
from stp_jax import data


@pytest.fixture(autouse=True)
def usual_promotion():
    """Optax's schedules need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    settings = ["model_options.hidden=8", "log_every=4", "checkpoint_every=8"]
    config = override(configs.load("stp_mlp").CONFIG, settings)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    digits = data.load("digits", data_dir=tmp_path_factory.mktemp("tfds"))
    dataset = data.ImageData(dataset=digits, augment=config.augment)
    return Context(config, tmp_path_factory.mktemp("none"), dataset, Console(), mesh)


def test_leaves_are_flagged_by_their_path():
    tree = {"a": jnp.ones(3), "b": {"c": jnp.array([1.0, jnp.nan])}, "n": jnp.int32(1)}
    tree["d"] = jnp.array([-jnp.inf, 0.0])
    assert finite.paths(tree) == ["a", "b.c", "d"]
    np.testing.assert_array_equal(jax.jit(finite.nonfinite)(tree), [False, True, True])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_leaf_is_flagged_alone_whatever_its_size(bad):
    """Leaves of one size are looked at together, large ones alone; the largest float is finite."""
    shapes = [(3,), (), (100, 50), (3, 1), (2,), (100, 50), ()]
    dtypes = [jnp.float32] * 5 + [jnp.bfloat16] * 2
    leaves = [
        jnp.full(shape, jnp.finfo(dtype).max, dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    flags = jax.jit(finite.nonfinite)
    assert not np.any(flags(leaves))
    for i, leaf in enumerate(leaves):
        damaged = list(leaves)
        damaged[i] = leaf.ravel().at[-1].set(bad).reshape(leaf.shape)
        np.testing.assert_array_equal(flags(damaged), np.arange(len(leaves)) == i)


def test_only_the_first_bad_step_is_told():
    watch = finite.Watch(["x", "y"])
    for step, flags in enumerate([[0, 0], [0, 1], [1, 1]], start=5):
        watch.note(step, jnp.array(flags, bool))
    assert watch.first() == (6, "y")
    assert watch.first() is None


def steps_saved(context, name):
    folder = context.workdir / "checkpoints" / name
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_step_that_diverges_is_named_with_its_layers_and_not_saved(
    context, tmp_path, monkeypatch
):
    """Infinite features from step 11 on, which lies between two looks (8 and 12)."""
    context = dataclasses.replace(context, workdir=tmp_path)
    batches = context.train_iterator("float")

    class Poisoned:
        """Becomes bad after ten batches."""

        count = 0

        def __next__(self):
            self.count += 1
            batch = next(batches)
            return {**batch, "input": batch["input"] * (np.inf if self.count > 10 else 1)}

        def get_state(self):
            return batches.get_state()

    monkeypatch.setattr(Context, "train_iterator", lambda *_: Poisoned())
    model = make_model(context)
    with pytest.raises(train.TrainingError) as caught:
        train.train_stage(
            context, model, train.Training("float", 1.0, 0.01, "float_lr", in_float=True)
        )
    told = str(caught.value)
    assert told.startswith("float, step 11: not finite: loss, gradient.layers.0.")
    assert "the last good checkpoint is kept" in told
    assert steps_saved(context, "float") == [8]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_weights_that_are_not_finite_are_named_before_the_first_step(context, tmp_path):
    context = dataclasses.replace(context, workdir=tmp_path)
    model = make_model(context)
    kernel = model.layers[2].kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(train.TrainingError, match=r"before step 1: .*params\.layers\.2\.kernel"):
        train.train_stage(
            context, model, train.Training("float", 1.0, 0.01, "float_lr", in_float=True)
        )
    assert steps_saved(context, "float") == []


def test_a_sound_stage_ends_finite(context, tmp_path):
    context = dataclasses.replace(context, workdir=tmp_path)
    model = make_model(context)
    model = train.train_stage(context, model, train.Training("float", 0.5, 0.01, in_float=True))
    assert not jnp.any(finite.nonfinite(nnx.state(model)))
    assert steps_saved(context, "float") == [8, 10]

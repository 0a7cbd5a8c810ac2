"""Any number of devices: the same metrics, whole groups on every shard, one compilation a stage."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import stp_jax
from experiments import configs, train
from experiments.config import override
from experiments.context import Context, make_model, make_policy
from experiments.runtime import sharding
from stp_jax import data


class SmallConv(nnx.Module):
    """A convolution with BatchNorm, a depthwise one, a dense layer: what networks are made of."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.fc = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.fc(jnp.mean(nnx.relu(self.depthwise(x)), axis=(1, 2)))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Optax's schedules need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return data.load("digits", data_dir=tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def make_context(digits, tmp_path):
    def make(devices, *settings):
        settings = ["model_options.hidden=16,16", "log_every=1", "checkpoint_every=100", *settings]
        config = override(configs.load("stp_mlp").CONFIG, settings)
        workdir = tmp_path / f"{devices}-{'-'.join(settings)}"
        mesh = sharding.make_mesh(jax.devices()[:devices])
        dataset = data.ImageData(dataset=digits, augment=config.augment)
        return Context(config, workdir, dataset, Console(quiet=True), mesh)

    return make


def losses(context):
    lines = (context.workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def few_steps(context, steps):
    return steps / context.steps_per_epoch


FLOAT = train.Training("float", 0.0, 0.05, in_float=True)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_1_2_and_8_devices_give_the_same_metrics_in_both_shardings(network, make_context):
    """All but the order of float32 sums is the same; BatchNorm sees the global batch."""
    found, scores = {}, {}
    for devices, kind in [(1, "data"), (2, "data"), (8, "data"), (8, "fsdp")]:
        context = make_context(devices, f"sharding={kind}")
        model = SmallConv() if network == "conv" else make_model(context)
        stage = FLOAT._replace(epochs=few_steps(context, 6))
        model = train.train_stage(context, model, stage)
        found[devices, kind] = losses(context)
        scores[devices, kind] = train.evaluate(context, model, "test")
    one = found.pop((1, "data"))
    assert len(one) == 6 and len(set(one)) == 6
    for values in found.values():
        np.testing.assert_allclose(values, one, rtol=2e-4)
    # An example more or less would show: it is 0.28 points of 360.
    first = scores.pop((1, "data"))
    assert all(score == pytest.approx(first, abs=0.6) for score in scores.values())


def test_guided_and_distilled_steps_start_alike_in_both_shardings(make_context):
    """Further on, a weight at the border between two few-term values may fall to either side."""
    found = []
    for devices, kind in [(1, "data"), (8, "fsdp")]:
        context = make_context(devices, f"sharding={kind}")
        teacher = make_model(context)
        model = stp_jax.quantize(teacher, make_policy(context.config, teacher))
        stp_jax.calibrate(model, [b["input"] for b in context.calibration_batches()])
        targets = dict.fromkeys(stp_jax.budgets(model), 6)
        stage = FLOAT._replace(
            name="guided", epochs=few_steps(context, 2), distill=0.5, guide_to=targets
        )
        train.train_stage(context, model, stage, teacher)
        found.append(losses(context))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


def test_fsdp_cuts_output_channels_and_nothing_else(make_context):
    context = make_context(8, "sharding=fsdp")
    _, params, rest = nnx.split(SmallConv(), nnx.Param, ...)
    tx = train.make_optimizer(context.config, lr=0.1, steps=10)
    state = train.TrainState(params, rest, tx.init(params))
    state = jax.device_put(state, train.state_shardings(context, state))

    def pieces(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): (
                leaf.shape,
                leaf.sharding.shard_shape(leaf.shape),
            )
            for path, leaf in leaves
        }

    shapes = pieces(state.params)
    assert shapes["conv.kernel.value"] == ((3, 3, 1, 16), (3, 3, 1, 2))
    assert shapes["depthwise.kernel.value"] == ((3, 3, 1, 16), (3, 3, 1, 2))
    assert shapes["fc.kernel.value"] == ((16, 10), (16, 10))  # 10 classes do not divide by 8
    for whole, piece in shapes.values():
        assert whole[:-1] == piece[:-1], "a group of weights lies along these axes"
    momentum = {key: value for key, value in pieces(state.opt_state).items() if "trace" in key}
    assert sorted(momentum.values()) == sorted(shapes.values())
    assert all(whole == piece for whole, piece in pieces(state.rest).values())


def test_gather_brings_everything_back_whole():
    mesh = sharding.make_mesh()
    tree = {"w": jnp.arange(32.0).reshape(2, 16), "key": jax.random.key(3), "n": 5}
    cut = dict(tree, w=jax.device_put(tree["w"], sharding.along_outputs(mesh, tree["w"])))
    whole = sharding.gather(cut)
    assert len(whole["w"].devices()) == 1
    np.testing.assert_array_equal(whole["w"], tree["w"])
    assert whole["n"] == 5 and whole["key"] == tree["key"]


def test_evaluation_counts_every_example_once(make_context):
    """A model that is always right scores 100 %, though the last batch is filled up."""

    class Oracle(nnx.Module):
        def __init__(self, images, labels):
            self.images, self.labels = nnx.Variable(images), nnx.Variable(labels)

        def __call__(self, x):
            # The label of each image, found by the image itself.
            images, labels = self.images[...], self.labels[...]
            distance = jnp.abs(x[:, None] - images[None]).sum((2, 3, 4))
            return jax.nn.one_hot(labels[jnp.argmin(distance, axis=1)], 10)

    context = make_context(8)
    (batch,) = context.dataset.eval_batches(batch_size=360)
    model = Oracle(jnp.asarray(batch["input"]), jnp.asarray(batch["label"]))
    for size in (8, 112, 360):
        config = dataclasses.replace(context.config, eval_batch_size=size)
        assert train.evaluate(dataclasses.replace(context, config=config), model, "test") == 100.0


def test_a_stage_compiles_its_step_once_though_budgets_anneal(make_context, caplog):
    context = make_context(2)
    model = make_model(context)
    model = stp_jax.quantize(model, make_policy(context.config, model))
    stp_jax.calibrate(model, [b["input"] for b in context.calibration_batches()])
    targets = dict.fromkeys(stp_jax.budgets(model), 4)
    stage = train.Training("guided", few_steps(context, 12), 0.05, guide_to=targets)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train.train_stage(context, model, stage)
    lines = (context.workdir / "metrics.jsonl").read_text().splitlines()
    allowed = [json.loads(line)["terms_per_weight"] for line in lines]
    assert len(set(allowed)) > 3, "budgets were to anneal"
    compiled = [r for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
    assert sum("jit(step)" in record.getMessage() for record in compiled) == 1


def test_two_runs_of_a_seed_are_bit_identical(make_context):
    def run(name):
        context = make_context(1, "seed=3")
        context = dataclasses.replace(context, workdir=context.workdir / name)
        context.workdir.mkdir(parents=True)
        model = make_model(context)
        model = stp_jax.quantize(model, make_policy(context.config, model))
        stage = FLOAT._replace(epochs=few_steps(context, 8))
        return nnx.state(train.train_stage(context, model, stage))

    jax.tree.map(np.testing.assert_array_equal, run("a"), run("b"))

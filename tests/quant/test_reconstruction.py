"""Reconstruction of whole models: what it returns is what running them gives, in both APIs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stp_jax
from stp_jax.terms import GroupLayout, count


def policy(budget=6, **options):
    options = {"weight_scale": "search", "activations": "none", **options}
    return stp_jax.Policy([stp_jax.Rule(path=".*", budget=budget, group_size=8, **options)])


def inputs(*shape, seed=0):
    """Images whose neighbours and channels go together, as real ones do."""
    x = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return x + 2 * jnp.roll(x, 1, axis=-1) + 2 * jnp.roll(x, 1, axis=1)


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Net(nnx.Module):
    """A strided, a depthwise and a 1×1 convolution with BatchNorm, and a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(5, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(16, rngs=rngs)
        self.point = nnx.Conv(16, 24, (1, 1), rngs=rngs)
        self.fc = nnx.Linear(24, 7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv(x)))
        x = nnx.relu(self.bn2(self.depthwise(x)))
        x = nnx.relu(self.point(x))
        return self.fc(x.mean(axis=(1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=True, name=name)

        x = nn.Conv(16, (3, 3), strides=2, use_bias=False, name="conv")(x)
        x = nn.relu(norm("bn1")(x))
        x = nn.Conv(16, (3, 3), feature_group_count=16, use_bias=False, name="depthwise")(x)
        x = nn.relu(norm("bn2")(x))
        x = nn.relu(nn.Conv(24, (1, 1), name="point")(x))
        return nn.Dense(7, name="fc")(x.mean(axis=(1, 2)))


def net():
    model = Net(nnx.Rngs(3))
    model.eval()
    return model


def linen_net(budget=6):
    float_model = net()
    params, stats = {}, {}
    for name in ("conv", "depthwise", "point", "fc", "bn1", "bn2"):
        layer = getattr(float_model, name)
        found = {key: getattr(layer, key, None) for key in ("kernel", "scale", "bias")}
        params[name] = {k: v[...] for k, v in found.items() if v is not None}
        if name.startswith("bn"):
            stats[name] = {"mean": layer.mean[...], "var": layer.var[...]}
    module = stp_jax.quantize(LinenNet(), policy(budget))
    start = jax.jit(module.init)(jax.random.key(0), jnp.ones((1, 12, 12, 5)))
    return module.bind({**start, "params": params, "batch_stats": stats})


BATCHES = [inputs(24, 12, 12, 5, seed=s) for s in (0, 1)]
OTHERS = inputs(64, 12, 12, 5, seed=9)
LAYERS = ["conv", "depthwise", "fc", "point"]


def distance(model, float_model, x):
    exact = float_model(x)
    return float(jnp.sum((model(x) - exact) ** 2) / jnp.sum((exact - exact.mean(0)) ** 2))


@pytest.fixture(scope="module")
def fitted():
    with jax.numpy_rank_promotion("allow"):
        stp = stp_jax.quantize(net(), policy())
        return stp, stp_jax.reconstruct(stp, BATCHES, dict.fromkeys(LAYERS, 6), sweeps=1)


def test_outputs_are_nearer_than_by_any_older_way_on_other_examples_too(fitted):
    stp, losses = fitted
    float_model = net()
    plain = stp_jax.quantize(float_model, policy())
    older = stp_jax.quantize(float_model, policy())
    stp_jax.compensate(older, BATCHES, dict.fromkeys(LAYERS, 6))
    ours = distance(stp, float_model, OTHERS)
    assert ours < 0.7 * distance(older, float_model, OTHERS)
    assert ours < 0.5 * distance(plain, float_model, OTHERS)
    # The last layer's loss is the model's.
    assert list(losses) == ["conv", "depthwise", "point", "fc"]
    whole = jnp.concatenate(BATCHES)
    np.testing.assert_allclose(losses["fc"], distance(stp, float_model, whole), rtol=0.02)


@pytest.mark.slow  # its fixture is
def test_kernels_fit_their_budgets_and_stay_under_projection(fitted):
    stp, _ = fitted
    layers = stp_jax.quantized_layers(stp)
    for path, integers in stp_jax.integer_weights(stp).items():
        layer, layout = layers[path], GroupLayout(8, layers[path].format.axes.groups)
        assert layout.sums(np.asarray(count(integers))).max() <= 6
        np.testing.assert_allclose(
            layer.scale * jnp.asarray(integers, jnp.float32), layer.kernel, rtol=1e-5
        )


@pytest.mark.slow  # its fixture is
def test_outputs_have_the_float_models_means_and_spreads(fitted):
    stp, _ = fitted
    whole = jnp.concatenate(BATCHES)
    found, wanted = stp(whole), net()(whole)
    spread = jnp.std(wanted, axis=0)
    error = jnp.mean(found - wanted, axis=0)
    assert float(jnp.max(jnp.abs(error) / spread)) < 0.01
    np.testing.assert_allclose(jnp.std(found, axis=0), spread, rtol=0.01)
    assert not np.allclose(stp.bn1.mean[...], net().bn1.mean[...])
    np.testing.assert_array_equal(stp.bn1.var[...], net().bn1.var[...])


def test_linen_models_are_fitted_alike(fitted):
    stp, losses = fitted
    bound = linen_net()
    found = stp_jax.reconstruct(bound, BATCHES, dict.fromkeys(LAYERS, 6), sweeps=1)
    assert found.keys() == losses.keys()
    for path, loss in found.items():
        np.testing.assert_allclose(loss, losses[path], rtol=0.05)
    np.testing.assert_allclose(
        distance(bound, net(), OTHERS), distance(stp, net(), OTHERS), rtol=0.1
    )


def test_layers_that_keep_every_term_make_up_for_those_before():
    rules = [
        stp_jax.Rule(path="conv", budget=3, weight_scale="search", activations="none"),
        stp_jax.Rule(path=".*", weight_scale="search", activations="none"),
    ]
    float_model = net()
    stp = stp_jax.quantize(float_model, stp_jax.Policy(rules))
    older = nnx.clone(stp)
    stp_jax.compensate(older, BATCHES, {"conv": 3})
    stp_jax.reconstruct(stp, BATCHES, {"conv": 3}, sweeps=1)
    assert distance(stp, float_model, OTHERS) < 0.8 * distance(older, float_model, OTHERS)
    assert stp_jax.budgets(stp) == {"conv": 3}


def test_budgets_may_differ_by_filter():
    stp = stp_jax.quantize(net(), policy(32))
    wanted = {"point": np.tile(np.array([2, 6, 9], np.int32), 8)}
    stp_jax.reconstruct(stp, BATCHES, wanted, sweeps=0, beam=2)
    kept = np.asarray(count(stp_jax.integer_weights(stp)["point"]))
    held = GroupLayout(8, (2,)).sums(kept).reshape(2, 24).max(0)
    assert np.all(held <= wanted["point"])
    assert held.max() > 6


class Twice(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.fc(self.fc(x))


class Jitted(Twice):
    def __call__(self, x):
        return jax.jit(self.fc)(x)


@pytest.mark.parametrize(
    ("make", "options", "arguments", "message"),
    [
        (net, {}, {"batches": []}, "at least one batch"),
        (net, {}, {"values": {"nothing": 4}}, "no quantized layer at nothing"),
        (net, {}, {"beam": 0}, "beam must be"),
        (net, {}, {"sweeps": -1}, "sweeps must be"),
        (net, {}, {"damping": 0.0}, "damping must be positive"),
        (net, {"weight_scale": "max"}, {}, "follows from the kernel"),
        (net, {"method": "greedy"}, {}, "must be 'optimal'"),
        (Twice, {}, {"batches": [jnp.ones((4, 8))]}, "runs more than once"),
        (Jitted, {}, {"batches": [jnp.ones((4, 8))]}, "inside a scan, vmap or jit"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(make, options, arguments, message):
    stp = stp_jax.quantize(make(), policy(**options))
    before = nnx.to_pure_dict(nnx.state(stp, nnx.Variable))
    arguments = {"batches": BATCHES, "values": {}} | arguments
    with pytest.raises(ValueError, match=message):
        stp_jax.reconstruct(stp, arguments.pop("batches"), arguments.pop("values"), **arguments)
    after = nnx.to_pure_dict(nnx.state(stp, nnx.Variable))
    jax.tree.map(np.testing.assert_array_equal, before, after)

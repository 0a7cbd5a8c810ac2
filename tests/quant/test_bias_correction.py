"""Bias correction: the means of all channels are those of the float kernels again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax.quant.bias import correct_bias

COARSE = stp_jax.Policy([stp_jax.Rule(path=".*", budget=2, activations="none")])


class ConvNet(nnx.Module):
    """conv → BatchNorm → relu → depthwise conv → BatchNorm → relu → dense."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, use_bias=False, rngs=rngs)
        self.depthwise_norm = nnx.BatchNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.depthwise_norm(self.depthwise(x)))
        return self.dense(jnp.mean(x, axis=(1, 2)))


def images(seed, number=16):
    return 1.0 + jax.random.normal(jax.random.key(seed), (number, 6, 6, 3), jnp.float32)


@pytest.fixture(name="network", scope="module")
def make_network():
    network = ConvNet(nnx.Rngs(0))
    network.eval()
    return network


def test_dense_layer_gets_the_float_layer_s_mean():
    layer = nnx.Sequential(nnx.Linear(12, 5, rngs=nnx.Rngs(1)))
    model = stp_jax.quantize(layer, COARSE)
    batches = [0.5 + jax.random.normal(jax.random.key(i), (64, 12), jnp.float32) for i in range(3)]
    x = jnp.concatenate(batches)
    expected = jnp.mean(layer(x), axis=0)
    assert np.max(np.abs(jnp.mean(model(x), axis=0) - expected)) > 0.01
    correct_bias(model, batches)
    np.testing.assert_allclose(jnp.mean(model(x), axis=0), expected, atol=1e-5)


def test_running_mean_takes_the_shift_where_there_is_no_bias(network):
    model = stp_jax.quantize(network, COARSE)
    before = {name: getattr(model, name).mean[...] for name in ("norm", "depthwise_norm")}
    x = images(2)
    shifts = correct_bias(model, [x])
    assert set(shifts) == {"conv", "depthwise", "dense"}
    moved = jnp.mean(model.conv(x) - network.conv(x), axis=(0, 1, 2))
    np.testing.assert_allclose(shifts["conv"], moved, atol=1e-5)
    np.testing.assert_allclose(model.norm.mean[...] - before["norm"], moved, atol=1e-5)
    np.testing.assert_allclose(
        model.depthwise_norm.mean[...] - before["depthwise_norm"], shifts["depthwise"], atol=1e-6
    )


def test_later_layers_are_measured_behind_corrected_ones(network):
    model = stp_jax.quantize(network, COARSE)
    x = images(3)
    shifts = correct_bias(model, [x])
    entering = nnx.relu(model.norm(model.conv(x)))
    moved = jnp.mean(model.depthwise(entering) - network.depthwise(entering), axis=(0, 1, 2))
    np.testing.assert_allclose(shifts["depthwise"], moved, atol=1e-5)


def test_outputs_come_nearer_to_the_float_network_s(network):
    model = stp_jax.quantize(network, COARSE)
    unseen = images(5, 64)

    def error():
        return float(jnp.mean((model(unseen) - network(unseen)) ** 2))

    plain = error()
    correct_bias(model, [images(4, 64)])
    assert error() < 0.5 * plain


def test_kernels_and_statistics_stay(network):
    model = stp_jax.quantize(network, COARSE)
    kernel, var = model.conv.kernel[...], model.norm.var[...]
    correct_bias(model, [images(6)])
    np.testing.assert_array_equal(model.conv.kernel[...], kernel)
    np.testing.assert_array_equal(model.norm.var[...], var)
    assert model.conv.promote_dtype is stp_jax.quantized_layers(model)["conv"].quantizer


def test_every_term_kept_leaves_next_to_nothing_to_correct(network):
    policy = stp_jax.Policy([stp_jax.Rule(path=".*", activations="none")])
    shifts = correct_bias(stp_jax.quantize(network, policy), [images(7)])
    assert max(float(jnp.max(jnp.abs(shift))) for shift in shifts.values()) < 0.02


def test_errors(network):
    model = stp_jax.quantize(network, COARSE)
    with pytest.raises(ValueError, match="at least one batch"):
        correct_bias(model, [])
    model.train()
    with pytest.raises(ValueError, match="norm' is in training mode"):
        correct_bias(model, [images(8)])
    bare = nnx.Sequential(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no quantized layer has a bias"):
        correct_bias(stp_jax.quantize(bare, COARSE), [jnp.ones((2, 4), jnp.float32)])


def test_layers_in_a_scan_are_refused():
    cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
    model = stp_jax.quantize(nnx.RNN(cell), COARSE)
    with pytest.raises(ValueError, match="inside a scan"):
        correct_bias(model, [jnp.ones((2, 5, 3), jnp.float32)])

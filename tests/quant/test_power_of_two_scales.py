"""Scales that are powers of two, and biases on the grid of the sums."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import stp_jax
from stp_jax import Policy, Rule
from stp_jax.terms import power_of_two

X = jax.random.normal(jax.random.key(1), (16, 8))


def is_power(scale):
    return bool(np.all(np.frexp(np.asarray(scale))[0] == 0.5))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_nearest_power_and_the_next_one_up(x):
    near, up = (float(power_of_two(jnp.float32(x), up=up)) for up in (False, True))
    assert is_power([near, up])
    assert abs(math.log2(near / x)) <= 0.5 + 1e-6
    assert x <= up < 2 * x


def test_zero_stays_zero_and_gradients_pass():
    assert float(power_of_two(jnp.float32(0))) == 0
    assert float(jax.grad(power_of_two)(jnp.float32(0.3))) == 1


def linear(weight_scale):
    rule = Rule(path=".*", power_of_two_scales=True, weight_scale=weight_scale, budget=9)
    model = stp_jax.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), Policy([rule]))
    model.bias[...] = jnp.array([0.3, -0.1, 1.7, 0.001])
    return model


def dense(weight_scale):
    rule = Rule(path=".*", power_of_two_scales=True, weight_scale=weight_scale, budget=9)
    quantized = stp_jax.quantize(nn.Dense(4, bias_init=nn.initializers.normal(0.3)), Policy([rule]))
    return quantized.bind(quantized.init(jax.random.key(0), X))


@pytest.mark.parametrize(
    ("make", "weight_scale"), [(linear, "max"), (linear, "learned"), (dense, "learned")]
)
def test_all_scales_are_powers_and_the_layer_computes_on_the_grid(make, weight_scale):
    model = make(weight_scale)
    stp_jax.calibrate(model, [X])
    (layer,) = stp_jax.quantized_layers(model).values()
    if weight_scale != "max":
        stp_jax.search_weight_scales(model)
        assert is_power(layer.stored_scale)  # the search tries nothing else
        layer.stored_scale = 1.3 * layer.stored_scale  # as training does
    assert is_power(layer.scale) and is_power(layer.input_scale)
    grid = layer.scale.reshape(-1) * layer.input_scale
    sums = np.asarray(model(X)) / np.asarray(grid)
    np.testing.assert_array_equal(sums, np.round(sums))
    np.testing.assert_array_equal(stp_jax.integer_model(model)(X), model(X))


def test_scales_and_biases_are_trained():
    model = linear("learned")
    stp_jax.calibrate(model, [X])
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_the_best_power_is_at_least_as_good_as_that_of_the_largest_weight():
    of_max, searched = linear("max"), linear("search")
    for model in (of_max, searched):
        model.kernel[...] = searched.kernel[...]
    stp_jax.search_weight_scales(searched)

    def error(model):
        return jnp.sum((stp_jax.project_params(model)["kernel"][...] - model.kernel[...]) ** 2)

    assert error(searched) <= error(of_max)


def test_scales_by_group_have_no_grid_of_sums():
    with pytest.raises(ValueError, match="one scale per filter"):
        Rule(path=".*", scale_group=8, power_of_two_scales=True)

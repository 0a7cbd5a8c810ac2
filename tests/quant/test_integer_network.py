"""The integer network is the STP model, in additions and shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.extend import core

import stp_jax
from stp_jax import Policy, Rule, models
from stp_jax.models.mobilenet import InvertedResidual
from stp_jax.models.resnet import BasicBlock
from stp_jax.quant.integer_steps import Requantize, Scale, few_terms, shift_right

X = jax.random.normal(jax.random.key(1), (3, 6, 6, 3))
V = jax.random.normal(jax.random.key(3), (5, 4))
RULE = {"power_of_two_scales": True, "weight_scale": "max", "budget": 9}


class Blocks(nnx.Module):
    """Residuals, a shortcut padded with zeros, a depthwise convolution, both kinds of pooling."""

    def __init__(self):
        options = {"rngs": nnx.Rngs(0), "dtype": None}
        self.stem = models.layers.conv(3, 4, 3, **options)
        self.norm = models.layers.batch_norm(4, **options)
        self.blocks = nnx.List(
            [
                BasicBlock(4, 6, stride=2, projection=False, **options),
                InvertedResidual(6, 6, stride=1, expansion=2, **options),
            ]
        )
        self.head = models.layers.linear(6, 5, **options)
        self.side = 2  # of the map that is averaged

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = nnx.max_pool(x, (2, 2), strides=(1, 1), padding="SAME")[:, : self.side, : self.side]
        return self.head(x.mean((1, 2)))


def quantized(model, x=X, **rule):
    model = stp_jax.quantize(model, Policy([Rule(path=".*", **RULE | rule)]))
    model.eval()
    stp_jax.calibrate(model, [x])
    return model


@pytest.fixture(scope="module")
def blocks():
    model = Blocks()
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = jnp.asarray(rng.normal(0, 0.2, module.mean.shape), jnp.float32)
            module.bias[...] = jnp.asarray(rng.normal(0, 0.2, module.mean.shape), jnp.float32)
    return quantized(stp_jax.fold_batch_norm(model, X))


@nnx.jit
def call(model, x):
    return model(x)


def integers(network, x):
    return jax.jit(network)(network.quantize(x))


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)):
            if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                yield from equations(getattr(value, "jaxpr", value))


def test_logits_are_those_of_the_stp_model_bit_for_bit(blocks):
    network = stp_jax.integer_network(blocks, X)
    assert network.error == 0
    y = integers(network, X)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(network.dequantize(y), call(blocks, X))


def test_shifts_and_additions_give_the_integers_of_products_and_are_all_there_is(blocks):
    multiply = stp_jax.integer_network(blocks, X)
    network = stp_jax.integer_network(blocks, X, arithmetic="shift_add")
    q = network.quantize(X)
    for a, b in zip(*(jax.jit(n.run)(q[:1]) for n in (multiply, network)), strict=True):
        np.testing.assert_array_equal(a, b)
    closed = jax.make_jaxpr(network)(q)
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    found = list(equations(closed.jaxpr))
    for eqn in found:
        assert not {"mul", "div", "dot", "integer_pow"} & {eqn.primitive.name}
        for var in (*eqn.invars, *eqn.outvars):
            assert jnp.issubdtype(var.aval.dtype, jnp.integer), eqn
    # What is left of products adds and subtracts: their kernels hold nothing but signs.
    products = [e for e in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert products and all(set(np.unique(constants[e.invars[1]])) <= {-1, 0, 1} for e in products)


def test_a_mean_over_nine_states_its_error_and_keeps_it(blocks):
    blocks = nnx.clone(blocks)
    blocks.side = 3
    network = stp_jax.integer_network(blocks, X)
    assert [step.factor for step in network.steps if isinstance(step, Scale)] == [1 / 9]
    far = jnp.abs(network.dequantize(integers(network, X)) - call(blocks, X)).max()
    assert network.error > 0 and far <= network.error


def test_every_step_says_what_it_is_and_its_integers_fit_its_bits(blocks):
    network = stp_jax.integer_network(blocks, X)
    lines = str(network).split("\n")
    assert len(lines) == len(network.steps) + 1
    assert any("Requantize" in line and "clip to +-127" in line for line in lines)
    extreme = 127 * np.sign(np.random.default_rng(0).normal(size=(1, *X.shape[1:])))
    values = jax.jit(network.run)(jnp.asarray(extreme, jnp.int32))
    for step, value in zip(network.steps, values[1:], strict=True):
        assert value.shape == step.shape and value.dtype == jnp.int32
        assert -(1 << (step.bits - 1)) <= value.min() <= value.max() < 1 << (step.bits - 1)


def test_a_linen_model():
    net = nn.Sequential([nn.Dense(4), nn.relu, lambda x: x.reshape(len(x), -1), nn.Dense(3)])
    stp = stp_jax.quantize(net, Policy([Rule(path=".*", **RULE)]))
    x = V.reshape(5, 2, 2)
    model = stp.bind(stp.init(jax.random.key(0), x))
    stp_jax.calibrate(model, [x])
    network = stp_jax.integer_network(model, x)
    np.testing.assert_array_equal(network.dequantize(integers(network, x)), jax.jit(model)(x))


@given(st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=50), st.integers(0, 20))
def test_a_shift_rounds_as_the_model_does(values, amount):
    q = np.array(values, np.int32)
    expected = np.round(q / 2.0**amount)
    np.testing.assert_array_equal(shift_right(jnp.asarray(q), np.int32(amount)), expected)


@given(
    st.lists(st.integers(-(2**29), 2**29), min_size=1, max_size=50),
    st.integers(2, 16),
    st.integers(-15, 20),
)
def test_requantization_is_the_model_s_quantizer(values, bits, right):
    right, largest = max(right, 1 - bits), (1 << (bits - 1)) - 1
    q = np.array(values, np.int32)
    step = Requantize(
        layer="", inputs=(0,), shape=q.shape, exponent=np.zeros(1, np.int32), bits=bits,
        right=np.full(1, right, np.int32), largest=largest,
    )  # fmt: skip
    expected = np.clip(np.round(q / 2.0**right), -largest, largest)
    np.testing.assert_array_equal(step.run(jnp.asarray(q)), expected)


@given(st.integers(1, 10_000))
def test_few_terms_are_near_enough(n):
    fraction, terms = few_terms(1 / n)
    value = sum(sign * 2.0 ** (e - fraction) for sign, e in terms)
    assert abs(value * n - 1) <= 2.0**-12
    assert len(terms) <= 7


class Small(nnx.Module):
    def __init__(self, function):
        self.first, self.last = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))
        self.function = function

    def __call__(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nnx.sigmoid, "'logistic' after layer 'first' has no integer form"),
        (lambda x: x * x, "'mul' after layer 'first' has no integer form"),
        (lambda x: x * jnp.array([[1.0, 3.0, 1.0, 1.0]]), "'mul' after layer 'first'"),
        (lambda x: x @ jnp.ones((4, 4)), "dot_general after layer 'first' has no integer kernel"),
        (lambda x: x * 2.0**30 + x, "after layer 'first' the step .* needs .* bits"),
    ],
)
def test_what_has_no_integer_form_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        stp_jax.integer_network(quantized(Small(function), V), V)


def test_other_mistakes_are_named():
    linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    model = quantized(linear, V)
    network = stp_jax.integer_network(model, V)
    with pytest.raises(TypeError, match="takes integers"):
        network(V)
    with pytest.raises(ValueError, match="expected shape"):
        network(jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="multiply or shift_add"):
        stp_jax.integer_network(model, V, arithmetic="float")
    with pytest.raises(ValueError, match="power_of_two_scales=True"):
        stp_jax.integer_network(quantized(linear, V, power_of_two_scales=False), V)
    with pytest.raises(ValueError, match="up to 16 bits and keep all their terms"):
        stp_jax.integer_network(quantized(linear, V, activation_terms=2), V)
    with pytest.raises(ValueError, match=r"call stp_jax\.calibrate"):
        uncalibrated = stp_jax.quantize(linear, Policy([Rule(path=".*", **RULE)]))
        stp_jax.integer_network(uncalibrated, V)
    scaled = nnx.Sequential(lambda x: nnx.relu(x), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="before a layer has quantized it"):
        stp_jax.integer_network(quantized(scaled, V), V)
    normed = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"fold it into the layer before it with stp_jax\.fold"):
        stp_jax.integer_network(quantized(normed, V), V)

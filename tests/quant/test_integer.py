"""The integer model computes what the STP model does, in integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule

X = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(8, 6, (2, 2), feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def build(net=Net, **rule):
    model = stp_jax.quantize(net(), Policy([Rule(path=".*", **rule)]))
    stp_jax.calibrate(model, [X])
    return model


def linear():
    return nnx.Linear(8, 4, rngs=nnx.Rngs(0))


@nnx.jit
def call(model, x):
    return model(x)


@pytest.mark.parametrize(
    ("net", "rule"),
    [(Net, {"budget": 9}), (linear, {"budget": 12, "encoding": "booth4", "bits": 10})],
)
def test_shift_and_add_equals_multiplication_bit_for_bit(net, rule):
    model = build(net, weight_scale="max", **rule)
    multiply = stp_jax.integer_model(model)
    shift_add = stp_jax.integer_model(model, arithmetic="shift_add")
    out = call(multiply, X)
    np.testing.assert_array_equal(out, call(shift_add, X))
    np.testing.assert_allclose(out, call(model, X), rtol=1e-4, atol=1e-5)


def test_a_layer_holds_the_integers_and_computes_their_exact_product():
    model = build(budget=9, weight_scale="search")
    integer = stp_jax.integer_model(model)
    q = stp_jax.integer_weights(model)["head"]
    np.testing.assert_array_equal(integer.head.kernel[...], q)
    assert integer.head.kernel[...].dtype == jnp.int8
    x = jax.random.normal(jax.random.key(2), (5, 6))
    quantizer = model.head.promote_dtype
    x_scale = np.asarray(quantizer.activation_scale[...])
    x_q = np.clip(np.round(np.asarray(x) / x_scale), -127, 127).astype(np.int64)
    scale = x_scale * np.asarray(quantizer.weight_scale[...]).reshape(-1)
    expected = (x_q @ q.astype(np.int64)) * scale + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(integer.head(x), expected, rtol=1e-6, atol=1e-6)


def test_the_stp_model_stays_as_it_is():
    model = build(budget=9, weight_scale="max")
    before = nnx.state(model)
    stp_jax.integer_model(model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_mistakes_are_named():
    rule = {"weight_scale": "max"}
    with pytest.raises(ValueError, match="multiply or shift_add"):
        stp_jax.integer_model(Net(), arithmetic="float")
    with pytest.raises(ValueError, match="no quantized layer"):
        stp_jax.integer_model(Net())
    float_inputs = stp_jax.quantize(Net(), Policy([Rule(path=".*", activations="none", **rule)]))
    with pytest.raises(ValueError, match="'conv': integer arithmetic needs activations"):
        stp_jax.integer_model(float_inputs)
    uncalibrated = stp_jax.quantize(Net(), Policy([Rule(path=".*", **rule)]))
    with pytest.raises(ValueError, match=r"call stp_jax\.calibrate"):
        stp_jax.integer_model(uncalibrated)
    other = nnx.Einsum("bi,io->bo", (8, 4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Einsum is not supported; keep it float with Rule\(path"):
        stp_jax.integer_model(stp_jax.quantize(other, Policy([Rule(path=".*", **rule)])))


@pytest.mark.parametrize("arithmetic", ["multiply", "shift_add"])
def test_attention_computes_in_integers(arithmetic):
    attention = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, decode=False, kernel_init=jax.nn.initializers.normal(0.5),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    model = stp_jax.quantize(attention, Policy([Rule(path=".*", budget=9)]))
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    stp_jax.calibrate(model, [x])
    integer = stp_jax.integer_model(model, arithmetic=arithmetic)
    assert integer.query.kernel[...].dtype == jnp.int8
    np.testing.assert_allclose(integer(x), model(x), rtol=1e-4, atol=1e-5)


def test_sums_that_int32_may_not_hold_are_refused():
    x = jnp.ones((2, 512))
    for bits, fits in ((8, True), (14, False)):
        model = nnx.Linear(512, 4, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
        model = stp_jax.quantize(model, Policy([Rule(path=".*", bits=bits, activation_bits=bits)]))
        stp_jax.calibrate(model, [x])
        if fits:
            np.testing.assert_allclose(stp_jax.integer_model(model)(x), model(x), rtol=1e-5)
        else:
            with pytest.raises(ValueError, match=r"layer '': sums of 14-bit weights .* int32"):
                stp_jax.integer_model(model)


def test_masked_weights_hold_no_terms(tmp_path):
    mask = jnp.zeros((2, 2, 8, 4)).at[:, :, ::2].set(1)
    conv = nnx.Conv(8, 4, (2, 2), mask=mask, rngs=nnx.Rngs(0))
    model = stp_jax.quantize(nnx.Sequential(conv), Policy([Rule(path=".*", budget=6)]))
    stp_jax.calibrate(model, [X])
    assert not stp_jax.weight_terms(model)["layers.0"][:, :, 1::2].any()
    stp_jax.export.save_packed(model, tmp_path / "masked")
    again = stp_jax.export.load_packed(nnx.Sequential(conv), tmp_path / "masked")
    np.testing.assert_array_equal(again(X), model(X))
    with pytest.raises(ValueError, match=r"layer 'layers.0': integer Conv with a mask is not"):
        stp_jax.integer_model(model)

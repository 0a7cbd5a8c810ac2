"""A rule's limit of terms per activation, in the STP model and in its integer model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import terms


@pytest.mark.parametrize(("method", "encoding"), [("optimal", "naf"), ("greedy", "hese")])
def test_inputs_hold_at_most_so_many_terms_and_integers_agree(method, encoding):
    rule = stp_jax.Rule(
        path=".*",
        budget=8,
        method=method,
        encoding=encoding,
        activation_terms=2,
        weight_scale="max",
    )
    layer = nnx.Sequential(nnx.Linear(16, 5, rngs=nnx.Rngs(0)))
    model = stp_jax.quantize(layer, stp_jax.Policy([rule]))
    x = jax.random.normal(jax.random.key(1), (32, 16), jnp.float32)
    stp_jax.calibrate(model, [x])
    (quantized,) = stp_jax.quantized_layers(model).values()
    scale = np.asarray(quantized.format.input_scale(x, quantized.stored_input_scale))
    v = np.round(np.asarray(quantized.quantizer.quantize_input(x)) / scale).astype(int)
    assert terms.count(v, encoding).max() == 2
    assert np.abs(v).max() <= 128
    for arithmetic in ("multiply", "shift_add"):
        integers = stp_jax.integer_model(model, arithmetic=arithmetic)
        np.testing.assert_allclose(integers(x), model(x), rtol=1e-5, atol=1e-5)


def test_limit_needs_integer_activations():
    with pytest.raises(ValueError, match="needs integer activations"):
        stp_jax.Rule(path=".*", activations="none", activation_terms=2)
    with pytest.raises(ValueError, match="terms of an activation"):
        stp_jax.Rule(path=".*", activation_terms=0)

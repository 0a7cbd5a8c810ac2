"""Steps of learned scales relative to their size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule

X = jax.random.normal(jax.random.key(0), (8, 16))
POLICY = Policy([Rule(path=".*", budget=8)])


def nnx_params():
    model = stp_jax.quantize(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), POLICY)
    stp_jax.calibrate(model, [X])
    return nnx.state(model, nnx.Param)


def linen_params():
    quantized = stp_jax.quantize(nn.Dense(4), POLICY)
    model = quantized.bind(quantized.init(jax.random.key(0), X))
    stp_jax.calibrate(model, [X])
    return {name: model.variables[name] for name in ("params", "stp_params")}


@pytest.mark.parametrize("make", [nnx_params, linen_params])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_scales_take_relative_steps(make, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), make())
    tx = stp_jax.relative_scale_steps()
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    seen = set()
    for (path, u), p in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        scale = "scale" in jax.tree_util.keystr(path)
        seen.add(scale)
        np.testing.assert_array_equal(u, jnp.abs(p) if scale else jnp.ones_like(p))
        assert u.dtype == dtype
    assert seen == {True, False}


def test_adam_keeps_scales_in_proportion():
    # One step of Adam is its learning rate; a scale of 0.003 would leave its range at once.
    params = nnx_params()
    tx = optax.chain(optax.adam(0.01), stp_jax.relative_scale_steps())
    gradients = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # Adam's own count of steps needs it
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    quantizer, before = updates["promote_dtype"], params["promote_dtype"]
    for name in ("weight_scale", "activation_scale"):
        ratio = jnp.abs(quantizer[name][...] / before[name][...])
        np.testing.assert_allclose(ratio, 0.01, rtol=1e-5)


def test_errors_name_the_remedy():
    tx = stp_jax.relative_scale_steps()
    with pytest.raises(ValueError, match="no learned scale among the parameters; quantize"):
        tx.init(nnx.state(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), nnx.Param))
    params = nnx_params()
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))

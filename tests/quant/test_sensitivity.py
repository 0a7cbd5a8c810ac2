"""Sensitivity: errors and gradients that the budget allocator weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule

X = jax.random.normal(jax.random.key(1), (3, 12))


def build(layer=None, **rule):
    rule = {"budget": 7, "activations": "none", "weight_scale": "max", **rule}
    layer = layer or nnx.Linear(12, 4, use_bias=False, rngs=nnx.Rngs(0))
    return stp_jax.quantize(layer, Policy([Rule(path=".*", **rule)]))


def test_curves_are_the_projected_kernels_errors():
    model = build(bits=5, group_size=4)
    kernel = np.asarray(model.kernel[...])
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2.0, kernel.shape), jnp.float32)
    # The projection of the call is unweighted: compare under equal weights, then scale them.
    plain = stp_jax.error_curves(model)[""]
    twice = stp_jax.error_curves(model, importance={"": jnp.full_like(weights, 2.0)})[""]
    np.testing.assert_allclose(twice, 2 * plain, rtol=1e-5)
    assert len(plain) == model.promote_dtype.format.rule.format.max_budget + 1
    for budget in (0, 3, 7, len(plain) - 1):
        projected = stp_jax.project_params(model, {"": budget})["kernel"][...]
        error = float(np.sum((np.asarray(projected) - kernel) ** 2))
        assert plain[budget] == pytest.approx(error, rel=1e-4, abs=1e-6)
    weighted = stp_jax.error_curves(model, importance={"": weights})[""]
    assert weighted[0] == pytest.approx(float(jnp.sum(weights * kernel**2)), rel=1e-5)
    assert np.all(np.diff(weighted) <= 1e-6)


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (lambda rngs: nnx.Linear(12, 4, rngs=rngs), 2 * 4),  # 12 inputs: 8 and a ragged 4
        (lambda rngs: nnx.Conv(16, 3, (3, 3), rngs=rngs), 9 * 2 * 3),
        (lambda rngs: nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs), 2 * 6),
    ],
)
def test_group_counts(layer, groups):
    assert stp_jax.group_counts(build(layer(nnx.Rngs(0)))) == {"": groups}


def test_squared_gradients_are_means_over_batches():
    model = build()
    batches = [X, 2 * X, -X]

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    found = stp_jax.squared_gradients(model, loss, batches)[""]
    # Straight through: d sum(sin(x q)) / dq at the quantized kernel q.
    q = np.asarray(stp_jax.project_params(model)["kernel"][...])
    by_hand = [(np.asarray(x).T @ np.cos(np.asarray(x) @ q)) ** 2 for x in batches]
    np.testing.assert_allclose(found, np.mean(by_hand, axis=0), rtol=1e-4, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="encoding naf, method optimal"):
        stp_jax.error_curves(build(encoding="booth4"))
    with pytest.raises(ValueError, match="encoding naf, method optimal"):
        stp_jax.error_curves(build(method="greedy"))
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.squared_gradients(build(), lambda model, x: jnp.sum(model(x)), [])

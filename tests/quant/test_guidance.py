"""Forms of guidance for a whole model: targets by chance, soft targets, damped oscillations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule

RULE = Rule(path=".*", budget=4, activations="none", weight_scale="search")
X = jax.random.normal(jax.random.key(1), (3, 16))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(name="model")
def make_model():
    return stp_jax.quantize(nnx.Linear(16, 6, rngs=nnx.Rngs(0)), Policy([RULE]))


def target(model, step=0, **options):
    """Where full strength takes the kernel from its present values."""
    tx = stp_jax.guidance(model, 1.0, **options)
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)._replace(step=jnp.int32(step))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return np.asarray(optax.apply_updates(params, updates)["kernel"][...])


def test_without_a_temperature_nothing_is_left_to_chance(model):
    hard = np.asarray(stp_jax.project_params(model)["kernel"][...])
    np.testing.assert_allclose(target(model), hard, rtol=1e-6, atol=1e-7)
    cooled = target(model, temperature=lambda step: jnp.float32(0.0), samples=3)
    np.testing.assert_allclose(cooled, hard, rtol=1e-5, atol=1e-6)


def test_stochastic_targets_are_few_term_values_that_differ_by_step(model):
    first, again, second = (target(model, step, temperature=1.0) for step in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0
    scale = np.asarray(stp_jax.quantized_layers(model)[""].scale)
    for found in (first, second):
        integers = np.rint(found / scale).astype(np.int32)
        np.testing.assert_allclose(integers * scale, found, rtol=1e-4, atol=1e-6)
        held = stp_jax.terms.count(integers).reshape(2, 8, 6).sum(1)
        assert int(held.max()) <= 4


def test_soft_targets_lie_nearer_to_the_weights_than_hard_ones(model):
    """The mean of choices is no few-term value; it leaves less of each weight behind."""
    kernel = np.asarray(model.kernel[...])
    soft = target(model, temperature=1.0, samples=64)
    choices = [target(model, step, temperature=1.0) for step in range(8)]
    error = lambda found: float(((found - kernel) ** 2).sum())  # noqa: E731
    assert error(soft) < min(error(found) for found in choices)


def test_linen_parameters_have_soft_targets_and_damping():
    quantized = stp_jax.quantize(nn.Dense(6), Policy([RULE]))
    model = quantized.bind(quantized.init(jax.random.key(0), X))
    params = model.variables["params"]
    tx = optax.chain(
        stp_jax.guidance(model, 1.0, temperature=0.5, samples=2), stp_jax.damping(model, 1.0)
    )
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert jnp.abs(updates["kernel"]).max() > 0
    assert jnp.abs(updates["bias"]).max() == 0


def test_damping_holds_a_weight_that_crosses_a_boundary_at_every_step():
    rule = Rule(path=".*", budget=1, activations="none", weight_scale="search")
    layer = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    model = stp_jax.quantize(layer, Policy([rule]))
    scale = float(stp_jax.quantized_layers(model)[""].scale.reshape(()))
    model.kernel[...] = jnp.full((1, 1), 5.9 * scale)  # between 4 and 8, of one term each

    def values(tx):
        params, found = nnx.state(model, nnx.Param), []
        state = tx.init(params)
        for i in range(40):
            push = jax.tree.map(lambda p: jnp.full_like(p, 0.3 * scale * (-1) ** i), params)  # noqa: B023
            updates, state = tx.update(push, state, params)
            params = optax.apply_updates(params, updates)
            kernel = float(params["kernel"][...].reshape(()))
            found.append(4 if kernel < 6 * scale else 8)
        return found

    assert set(values(optax.identity())[-8:]) == {4, 8}
    damped = values(stp_jax.damping(model, 1.0, threshold=0.3, momentum=0.2))
    assert len(set(damped[-20:])) == 1


def test_mistakes_are_named(model):
    with pytest.raises(ValueError, match="temperature must be 0 or more"):
        stp_jax.guidance(model, 0.1, temperature=-1.0)
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        stp_jax.guidance(model, 0.1, temperature=1.0, samples=0)
    greedy = Rule(path=".*", budget=4, activations="none", method="greedy")
    layer = stp_jax.quantize(nnx.Linear(16, 6, rngs=nnx.Rngs(0)), Policy([greedy]))
    with pytest.raises(ValueError, match="greedy takes no importance"):
        stp_jax.guidance(layer, 0.1, temperature=1.0)


def test_a_part_of_the_parameters_is_refused(model):
    for transform in (stp_jax.guidance(model, 0.1), stp_jax.damping(model, 0.1)):
        tx = optax.masked(transform, lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
        params = nnx.state(model, nnx.Param)
        with pytest.raises(ValueError, match="targets need all 2 parameters of the model, got 1"):
            tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)

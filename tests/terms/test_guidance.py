"""Guidance: weights move towards their targets, and budgets fall on time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stp_jax.terms import budget_schedule, guide

PARAMS = {"w": jnp.asarray([1.0, -2.0], jnp.float32), "b": jnp.asarray([0.5], jnp.float32)}
TARGETS = {"w": jnp.asarray([2.0, -2.0], jnp.float32), "b": PARAMS["b"]}
GRADS = {"w": jnp.asarray([0.3, 0.4], jnp.float32), "b": jnp.asarray([-1.0], jnp.float32)}


def step(tx, state=None, params=PARAMS):
    state = tx.init(params) if state is None else state
    updates, state = tx.update(GRADS, state, params, targets=TARGETS)
    return optax.apply_updates(params, updates), state


def test_full_strength_lands_on_the_targets():
    after, _ = step(optax.chain(optax.sgd(0.1), guide(1.0)))
    chex.assert_trees_all_close(after, TARGETS, rtol=1e-6)


def test_no_strength_leaves_the_optimizer_alone():
    alone, _ = step(optax.with_extra_args_support(optax.sgd(0.1)))
    guided, _ = step(optax.chain(optax.sgd(0.1), guide(0.0)))
    chex.assert_trees_all_equal(alone, guided)


def test_strength_is_the_fraction_of_the_way_left_by_the_optimizer():
    alone, _ = step(optax.with_extra_args_support(optax.sgd(0.1)))
    guided, _ = step(optax.chain(optax.sgd(0.1), guide(0.25)))
    expected = jax.tree.map(lambda a, t: a + 0.25 * (t - a), alone, TARGETS)
    chex.assert_trees_all_close(guided, expected, rtol=1e-6)


def test_a_schedule_is_asked_for_each_step_under_jit():
    tx = guide(lambda count: jnp.where(count < 1, 0.0, 1.0))
    run = jax.jit(lambda params, state: step(tx, state, params))
    params, state = run(PARAMS, tx.init(PARAMS))
    chex.assert_trees_all_close(params, jax.tree.map(jnp.add, PARAMS, GRADS))
    params, state = run(params, state)
    chex.assert_trees_all_close(params, TARGETS, rtol=1e-6)
    assert int(state.step) == 2


def test_updates_keep_their_dtype():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = guide(0.5)
    updates, _ = tx.update(params, tx.init(params), params, targets=params)
    assert updates["w"].dtype == jnp.bfloat16


def test_guidance_mistakes_are_named():
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            guide(wrong)
    tx = guide(0.5)
    with pytest.raises(ValueError, match="needs params and targets"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs params and targets"):
        tx.update(GRADS, tx.init(PARAMS), targets=TARGETS)


def test_budgets_fall_from_start_to_end():
    schedule = budget_schedule(20, 6, 10, warmup=3)
    values = np.array([int(schedule(step)) for step in range(20)])
    assert (values[:4] == 20).all() and (values[13:] == 6).all()
    assert (np.diff(values) <= 0).all()
    assert values[8] == 13  # half way
    assert schedule(5).dtype == jnp.int32
    assert jax.jit(schedule)(jnp.int32(8)) == 13


def test_schedule_mistakes_are_named():
    with pytest.raises(ValueError, match="0 or more"):
        budget_schedule(-1, 4, 10)
    with pytest.raises(ValueError, match="steps"):
        budget_schedule(8, 4, 0)

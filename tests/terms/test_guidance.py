"""Guidance: weights move towards their targets, and budgets fall on time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stp_jax.terms import (
    budget_schedule,
    choice_weights,
    damp_oscillations,
    guide,
    project,
)

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


def through(tx, targets, params=0.5):
    """The parameter after each step without gradients, for a sequence of its targets."""
    params, state, after = jnp.full(1, params), tx.init(jnp.full(1, params)), []
    for target in targets:
        zeros = jnp.zeros_like(params)
        updates, state = tx.update(zeros, state, params, targets=jnp.full(1, target, jnp.float32))
        params = optax.apply_updates(params, updates)
        after.append(float(params[0]))
    return after, state


def test_only_weights_that_jump_back_and_forth_are_pulled():
    tx = damp_oscillations(1.0, threshold=0.3, momentum=0.2)
    still, _ = through(tx, [1.0] * 12)
    rising, _ = through(tx, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    drifting, _ = through(tx, [1.0 + 0.001 * (-1) ** i for i in range(12)])  # a scale's drift
    assert still == [0.5] * 12
    assert rising == [0.5] * 6
    assert drifting == [0.5] * 12
    # The first change has no direction before it: o = 0, 0, 1, 1, … and f = 0, 0, 0.2, 0.36.
    jumping, _ = through(tx, [1.0, 2.0, 1.0, 2.0])
    assert jumping == [0.5, 0.5, 0.5, 2.0]


def test_frequency_is_the_moving_mean_and_lets_go_again():
    tx = damp_oscillations(0.5, threshold=0.1, momentum=0.5)
    after, state = through(tx, [1.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0], params=0.0)
    assert float(state.frequency[0]) == pytest.approx(0.75 / 2**4)
    pulled = np.diff(after, prepend=0.0) != 0
    assert pulled.tolist() == [False, False, True, True, True, True, False, False]


def test_a_parameter_that_is_its_own_target_is_never_damped():
    tx = damp_oscillations(1.0, threshold=0.0, momentum=1.0)
    params = {"b": jnp.zeros(2)}
    state = tx.init(params)
    for i in range(6):
        grads = {"b": jnp.full(2, float((-1) ** i))}
        updates, state = tx.update(grads, state, params, targets=params)
        chex.assert_trees_all_equal(updates, grads)
        params = optax.apply_updates(params, updates)


def test_choices_are_by_the_gains_to_the_power_of_one_over_the_temperature():
    """Two weights share one term: 4 gains 16 and 2 gains 4, so that at T = 1 the odds are 4 : 1."""
    w = jnp.tile(jnp.asarray([[4.0], [2.0]]), (1, 20000))

    def rate(temperature):
        weights = choice_weights(jax.random.key(0), w.shape, temperature)
        v = project(w, group_size=2, budget=1, axis=0, importance=weights)
        return float(jnp.mean(v[0] == 4))

    assert rate(1.0) == pytest.approx(4 / 5, abs=0.01)
    assert rate(0.5) == pytest.approx(16 / 17, abs=0.01)
    assert rate(0.0) == 1.0


def test_damping_mistakes_are_named():
    for wrong in ({"strength": 2.0}, {"threshold": -1.0}, {"momentum": 0.0}, {"resolution": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            damp_oscillations(**{"strength": 0.5} | wrong)
    tx = damp_oscillations(0.5)
    with pytest.raises(ValueError, match="damp_oscillations needs params and targets"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

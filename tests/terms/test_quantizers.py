"""Weight quantizers: their values, LSQ's gradient rule and the search for scales."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.terms import (
    WeightFormat,
    count,
    max_scale,
    project,
    project_scaled,
    quantize_weights,
    quantize_weights_relaxed,
    search_scale,
)

FORMAT = WeightFormat(group_size=4)
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 8, 5)), jnp.float32)
SCALE = max_scale(W, axes=(0, 1))


def test_values_are_scale_times_the_projection():
    q = quantize_weights(W, SCALE, 6, axes=(1,), fmt=FORMAT)
    v = project(W / SCALE, group_size=4, budget=6, axis=1, limit=127)
    np.testing.assert_allclose(q, SCALE * v.astype(jnp.float32), rtol=1e-6)
    np.testing.assert_array_equal(project_scaled(W, SCALE, 6, axes=(1,), fmt=FORMAT), v)


def test_the_maximum_budget_is_rounding():
    v = project_scaled(W, SCALE, FORMAT.max_budget, axes=(1,), fmt=FORMAT)
    np.testing.assert_array_equal(v, np.round(np.asarray(W / SCALE)))


def test_groups_over_merged_axes_share_the_budget_in_order():
    v = np.asarray(project_scaled(W, SCALE, 5, axes=(0, 1), fmt=FORMAT))
    groups = np.asarray(count(v)).reshape(6, 4, 5).sum(1)  # 3 * 8 weights in groups of 4
    assert groups.max() == 5


@pytest.mark.parametrize("budget", [0, 5, 16])
@pytest.mark.parametrize(("encoding", "method"), [("naf", "optimal"), ("binary", "greedy")])
def test_gradients_follow_the_rule(budget, encoding, method):
    """LSQ (Esser et al., ICLR 2020, eqs. 3 and 5) but where the budget has taken terms."""
    fmt = WeightFormat(group_size=4, encoding=encoding, method=method)
    scale = SCALE * jnp.float32(0.6)  # some weights lie outside
    g = jnp.asarray(RNG.normal(size=W.shape), jnp.float32)
    _, pull = jax.vjp(lambda w, s: quantize_weights(w, s, budget, axes=(1,), fmt=fmt), W, scale)
    to_w, to_scale = pull(g)
    u = np.asarray(W, np.float64) / np.asarray(scale)
    v = np.asarray(project_scaled(W, scale, budget, axes=(1,), fmt=fmt))
    inside = np.abs(u) <= 127
    assert not inside.all()
    np.testing.assert_array_equal(to_w, np.where(inside, g, 0))
    rounded = np.abs(v - np.clip(u, -127, 127)) <= 0.5
    assert rounded.all() == (budget == fmt.max_budget)
    power = np.maximum((v.astype(float) ** 2).sum((0, 1), keepdims=True), 1)
    local = np.where(rounded, np.where(inside, v - u, v) / np.sqrt(3 * 8 * 127), v / power)
    expected = (np.asarray(g) * local).sum((0, 1), keepdims=True)
    np.testing.assert_allclose(to_scale, expected, rtol=1e-4, atol=1e-5)


def test_scales_do_not_shrink_because_pruned_weights_grow():
    """A norm behind the layer undoes its scale, so that the loss asks for no other one."""
    w = jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)
    x, target = (jnp.asarray(RNG.normal(size=(256, n)), jnp.float32) for n in (64, 8))
    scale = search_scale(w, 2, axes=(0,), scale_axes=(0,))

    def loss(scale):
        y = x @ quantize_weights(w, scale, 2, axes=(0,))
        return jnp.mean((y / jnp.std(y, axis=0, keepdims=True) - target) ** 2)

    steps = jax.grad(loss)(scale) / scale
    np.testing.assert_allclose(steps, 0, atol=1e-3)


BY_FILTER = np.array([0, 3, 6, 9, 16])


@pytest.mark.parametrize(("axes", "scale_axes"), [((1,), (0, 1)), ((0, 1), (0, 1))])
def test_filters_with_budgets_of_their_own_are_quantized_as_if_alone(axes, scale_axes):
    g = jnp.asarray(RNG.normal(size=W.shape), jnp.float32)

    def quantized(w, scale, budget):
        return quantize_weights(w, scale, budget, axes=axes, fmt=FORMAT)

    q, pull = jax.vjp(lambda w, s: quantized(w, s, BY_FILTER), W, SCALE)
    to_w, to_scale = pull(g)
    searched = search_scale(W, BY_FILTER, axes=axes, scale_axes=scale_axes, fmt=FORMAT)
    for i, budget in enumerate(BY_FILTER):
        one = np.s_[..., i : i + 1]
        alone, pull = jax.vjp(lambda w, s: quantized(w, s, int(budget)), W[one], SCALE[one])  # noqa: B023
        np.testing.assert_array_equal(q[one], alone)
        for found, expected in zip((to_w, to_scale), pull(g[one]), strict=True):
            np.testing.assert_allclose(found[one], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            searched[one],
            search_scale(W[one], int(budget), axes=axes, scale_axes=scale_axes, fmt=FORMAT),
        )


def test_relaxed_budgets_by_filter_have_the_gradients_of_each():
    g = jnp.asarray(RNG.normal(size=W.shape), jnp.float32)
    budgets = jnp.array([0.5, 3.25, 6.0, 9.75, 15.5])

    def quantized(w, scale, budget):
        return quantize_weights_relaxed(w, scale, budget, axes=(1,), fmt=FORMAT)

    q, pull = jax.vjp(quantized, W, SCALE, budgets)
    found = pull(g)[2]
    for i in range(5):
        one = np.s_[..., i : i + 1]
        alone, pull = jax.vjp(quantized, W[one], SCALE[one], budgets[i])
        np.testing.assert_allclose(q[one], alone, rtol=1e-6)
        np.testing.assert_allclose(found[i], pull(g[one])[2], rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_every_budget():
    @jax.jit
    @chex.assert_max_traces(1)
    def quantize(w, budget):
        return quantize_weights(w, SCALE, budget, axes=(1,), fmt=FORMAT)

    for budget in (0, 5, 16):
        expected = quantize_weights(W, SCALE, budget, axes=(1,), fmt=FORMAT)
        chex.assert_trees_all_close(quantize(W, jnp.int32(budget)), expected, rtol=1e-6)


def test_bfloat16_weights_are_computed_in_float32():
    w = W.astype(jnp.bfloat16)
    q = quantize_weights(w, SCALE, 6, axes=(1,), fmt=FORMAT)
    exact = quantize_weights(w.astype(jnp.float32), SCALE, 6, axes=(1,), fmt=FORMAT)
    assert q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(q, exact.astype(jnp.bfloat16))


def test_max_scale():
    w = jnp.asarray([[1.0, -254.0, 0.0], [0.5, 127.0, 0.0]], jnp.float32)
    np.testing.assert_allclose(max_scale(w, axes=(0,)), [[1 / 127, 2.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(max_scale(w, axes=(0, 1), bits=4), [[254 / 7]], rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_search_takes_the_candidate_of_least_error(weighted):
    importance = jnp.asarray(RNG.uniform(0.0, 2.0, W.shape), jnp.float32) if weighted else None
    found = np.asarray(
        search_scale(
            W,
            4,
            axes=(1,),
            scale_axes=(0, 1),
            fmt=FORMAT,
            importance=importance,
            candidates=9,
            lowest=0.5,
        )
    )
    errors, scales = [], []
    for ratio in np.linspace(0.5, 1.15, 9, dtype=np.float32):
        scale = SCALE * ratio
        v = np.asarray(project_scaled(W, scale, 4, axes=(1,), fmt=FORMAT))
        error = (np.asarray(scale) * v - np.asarray(W)) ** 2
        error = error * (1.0 if importance is None else np.asarray(importance))
        errors.append(error.sum((0, 1)))
        scales.append(np.asarray(scale)[0, 0])
    best = np.take_along_axis(np.asarray(scales), np.argmin(errors, 0)[None], 0)[0]
    np.testing.assert_allclose(found[0, 0], best, rtol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="2 or more to hold a sign"):
        WeightFormat(bits=1)
    with pytest.raises(ValueError, match="best"):
        WeightFormat(method="best")
    with pytest.raises(ValueError, match="positive integer"):
        WeightFormat(group_size=0)
    with pytest.raises(ValueError, match="gray"):
        WeightFormat(encoding="gray")
    with pytest.raises(ValueError, match="must have the axes"):
        quantize_weights(W, SCALE[0], 4, axes=(1,))
    with pytest.raises(ValueError, match="must have the axes"):
        quantize_weights(W, jnp.ones((2, 1, 1)), 4, axes=(1,))
    with pytest.raises(ValueError, match="adjacent"):
        quantize_weights(W, SCALE, 4, axes=(0, 2))
    with pytest.raises(ValueError, match="outside"):
        quantize_weights(W, SCALE, 33, axes=(1,))
    with pytest.raises(TypeError, match="budgets are integers"):
        project_scaled(W, SCALE, 1.5, axes=(1,), fmt=FORMAT)
    with pytest.raises(ValueError, match="candidates"):
        search_scale(W, 4, axes=(1,), scale_axes=(0, 1), candidates=0)
    with pytest.raises(ValueError, match="slack must be 0 or more"):
        search_scale(W, 4, axes=(1,), scale_axes=(0, 1), slack=-0.1)


@pytest.mark.parametrize(("budget", "grows"), [(2, True), (16, False)])
def test_slack_leaves_room_where_it_costs_little(budget, grows):
    """Few terms of few bits are as near at larger scales; dense weights of few bits are not."""
    fmt = WeightFormat(bits=4)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 8)), jnp.float32)
    axes = {"axes": (0,), "scale_axes": (0,)}
    best, roomy = (search_scale(w, budget, **axes, fmt=fmt, slack=slack) for slack in (0.0, 0.03))

    def error(scale):
        v = np.asarray(project_scaled(w, scale, budget, axes=(0,), fmt=fmt))
        return ((np.asarray(scale) * v - np.asarray(w)) ** 2).sum(axis=0)

    assert np.all(error(roomy) <= 1.0301 * error(best))
    growth = np.asarray(roomy) / np.asarray(best)
    assert np.all(growth >= 1) and (np.mean(growth) > 1.5) == grows


def test_a_filter_of_zeros_keeps_the_power_of_two_of_its_largest_weight():
    """All scales are as good there; the first that is tried is that of `max_scale`."""
    w = jnp.zeros((8, 1), jnp.float32)
    found = search_scale(w, 1, axes=(0,), scale_axes=(0,), powers_of_two=True)
    np.testing.assert_array_equal(found, max_scale(w, axes=(0,)))


def test_relaxed_budgets_lie_between_whole_ones():
    w = jax.random.normal(jax.random.key(0), (24, 3))
    scale = 1.01 * max_scale(w, axes=(0,))  # nothing is clipped
    cotangent = jax.random.normal(jax.random.key(1), w.shape)

    def whole(k):
        return quantize_weights(w, scale, k, axes=(0,))

    @jax.jit
    def relaxed(budget, w=w):
        return quantize_weights_relaxed(w, scale, budget, axes=(0,))

    for k in (0, 5, 31):
        np.testing.assert_array_equal(relaxed(float(k)), whole(k))
        between = 0.75 * whole(k) + 0.25 * whole(k + 1)
        np.testing.assert_allclose(relaxed(k + 0.25), between, rtol=1e-6, atol=1e-7)
        gradient = jax.grad(lambda b: jnp.sum(cotangent * relaxed(b)))(k + 0.25)
        expected = jnp.sum(cotangent * (whole(k + 1) - whole(k)))
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(relaxed(40.0), whole(32))
    assert jax.grad(lambda b: jnp.sum(relaxed(b)))(40.0) == 0.0
    # Straight through to the weights, as at whole budgets.
    through = jax.grad(lambda w: jnp.sum(cotangent * relaxed(5.5, w)))(w)
    np.testing.assert_allclose(through, cotangent, rtol=1e-6)


def test_nan_weights_are_never_hidden():
    """A traced weight cannot be checked, and a model that has diverged must not look sound."""
    w = W.at[0, 1, 2].set(jnp.nan)
    q = jax.jit(lambda w: quantize_weights(w, SCALE, 6, axes=(1,), fmt=FORMAT))(w)
    np.testing.assert_array_equal(jnp.isnan(q), jnp.isnan(w))
    with pytest.raises(ValueError, match="1 of the 120 weights are NaN"):
        project_scaled(w, SCALE, 6, axes=(1,), fmt=FORMAT)
    with pytest.raises(ValueError, match="1 of the 120 weights are NaN"):
        search_scale(w, 6, axes=(1,), scale_axes=(0, 1), fmt=FORMAT)
    for importance in (-1.0, np.inf):
        with pytest.raises(ValueError, match="importance must be finite and 0 or more"):
            search_scale(
                W, 6, axes=(1,), scale_axes=(0, 1), fmt=FORMAT, importance=jnp.full((), importance)
            )

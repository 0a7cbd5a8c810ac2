"""Projection: published examples, and the optimum against independent searches."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax import terms
from stp_jax.terms.codebook import few_term_values


def project(w, budget, **options):
    w = np.asarray(w)
    options = {"group_size": w.shape[0], "axis": 0, **options}
    return np.asarray(terms.project(w, budget=budget, **options))


@pytest.mark.parametrize(
    ("w", "budget", "expected"),
    [
        ([11, 5, 3, 1], 4, [12, 4, 4, 0]),
        ([7, 7, 7, 7], 3, [8, 8, 8, 0]),
        ([100, -50, 25, -12, 6, 3, 1, 0], 12, [100, -50, 24, -12, 8, 4, 0, 0]),
        ([100, -50, 25, -12, 6, 3, 1, 0], 6, [96, -48, 32, -16, 0, 0, 0, 0]),
    ],
)
def test_greedy_is_term_revealing(w, budget, expected):
    assert project(w, budget, method="greedy").tolist() == expected


def least_error(w, budget, encoding, bits, limit, importance):
    """An independent dynamic programme in float64: the least weighted squared error."""
    best = np.zeros(budget + 1)
    for value, weight in zip(np.asarray(w, np.float64), importance, strict=True):
        errors = [
            weight * np.min((value - few_term_values(t, encoding, bits, limit)) ** 2)
            for t in range(terms.max_terms(encoding, bits) + 1)
        ]
        best = np.array(
            [
                min(best[j - t] + e for t, e in enumerate(errors) if t <= j)
                for j in range(budget + 1)
            ]
        )
    return best[budget]


@st.composite
def problems(draw):
    bits = draw(st.sampled_from([3, 4, 8]))
    encoding = draw(st.sampled_from(list(terms.ENCODINGS)))
    size = draw(st.sampled_from([1, 2, 5, 8]))
    top = 1 << (bits - 1)
    number = st.integers(-top, top) if draw(st.booleans()) else st.floats(-top, top, width=32)
    w = draw(st.lists(number, min_size=size, max_size=size))
    budget = draw(st.integers(0, terms.max_budget(size, encoding, bits)))
    limit = draw(st.sampled_from([None, top - 1]))
    weights = st.floats(0.125, 8.0, width=16)
    importance = draw(st.lists(weights, min_size=size, max_size=size))
    return np.asarray(w, np.float32), budget, encoding, bits, limit, importance


@settings(max_examples=50)  # each compiles a program of its own
@given(problems())
def test_optimal_is_the_least_error_within_the_budget(problem):
    w, budget, encoding, bits, limit, importance = problem
    v = project(
        w,
        budget,
        encoding=encoding,
        bits=bits,
        limit=limit,
        importance=jnp.asarray(importance, jnp.float32),
    )
    bound = limit or 1 << (bits - 1)
    assert np.abs(v).max() <= bound
    assert int(terms.count(v, encoding, bits).sum()) <= budget
    clipped = np.clip(w.astype(np.float64), -bound, bound)
    error = np.sum(np.asarray(importance) * (clipped - v) ** 2)
    least = least_error(clipped, budget, encoding, bits, limit, importance)
    assert error == pytest.approx(least, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
def test_optimal_against_every_tuple_of_values(encoding):
    values = np.arange(-8, 9)
    counts = np.asarray(terms.count(values, encoding, 4))
    tuples = np.array(list(itertools.product(range(17), repeat=3)))
    spent = counts[tuples].sum(axis=1)
    rng = np.random.default_rng(0)
    for w in rng.uniform(-8, 8, size=(6, 3)):
        errors = ((values[tuples] - w) ** 2).sum(axis=1)
        for budget in range(terms.max_budget(3, encoding, 4) + 1):
            v = project(w.astype(np.float32), budget, encoding=encoding, bits=4)
            assert np.sum((w - v) ** 2) == pytest.approx(errors[spent <= budget].min(), abs=1e-5)


@pytest.mark.parametrize("storable", [False, True])
@pytest.mark.parametrize("bits", range(4, 17))
def test_naf_errors_are_convex_and_reached_by_pursuit(bits, storable):
    """The two properties that `optimal` rests on, on a grid of eighths (integers above 10 bits)."""
    top = 1 << (bits - 1)
    limit = top - 1 if storable else top
    steps = 8 if bits <= 10 else 1
    w = np.arange(-limit * steps, limit * steps + 1) / steps
    most = terms.max_terms("naf", bits)
    nearest = []
    for t in range(most + 1):
        values = few_term_values(t, "naf", bits, limit).astype(np.float64)
        above = np.clip(np.searchsorted(values, w), 1, max(1, len(values) - 1))
        low, high = values[above - 1], values[np.minimum(above, len(values) - 1)]
        nearest.append(np.minimum(np.abs(w - low), np.abs(w - high)))
    squared = np.square(nearest)
    gains = squared[:-1] - squared[1:]
    assert np.all(gains >= 0)
    assert np.all(gains[:-1] - gains[1:] >= -1e-9)
    for t in range(most + 1):
        v = project(w[None], t, group_size=1, bits=bits, limit=limit)
        np.testing.assert_allclose(np.abs(w[None] - v), nearest[t][None], atol=1e-6)


def test_binary_errors_are_not_convex():
    """Why the other encodings take a dynamic programme instead."""
    w = np.arange(128)
    errors = [np.min((w[:, None] - few_term_values(t, "binary", 8)) ** 2, axis=1) for t in range(8)]
    gains = -np.diff(errors, axis=0)
    assert np.any(gains[1:] > gains[:-1])


def test_optimum_beats_greedy_in_error():
    """Gaussian weights in int8: the optimum's error is the least at both usual budgets."""
    rng = np.random.default_rng(0)
    w = np.clip(np.round(rng.normal(size=(8, 20000)) * 27), -127, 127).astype(np.int32)

    def error(**options):
        return np.mean((w - project(w, **options)) ** 2.0)

    for budget in (8, 12):
        greedy = [error(budget=budget, method="greedy", encoding=e) for e in ("hese", "naf")]
        assert error(budget=budget) < 0.85 * min(greedy)


@settings(max_examples=30)
@given(
    st.integers(0, 2),
    st.integers(1, 9),
    st.integers(0, 12),
    st.sampled_from(["optimal", "greedy"]),
    st.randoms(use_true_random=False),
)
def test_any_axis_and_ragged_groups(axis, group_size, budget, method, random):
    shape = tuple(random.choice([1, 3, 4, 9, 33]) for _ in range(3))
    rng = np.random.default_rng(random.randrange(2**32))
    w = rng.uniform(-127, 127, size=shape).astype(np.float32)
    budget = min(budget, terms.max_budget(group_size))
    options = {"group_size": group_size, "budget": budget, "method": method}
    v = np.asarray(terms.project(w, axis=axis, **options))
    assert v.shape == shape and v.dtype == np.int32
    rows = np.moveaxis(w, axis, -1).reshape(-1, shape[axis])
    expected = np.concatenate(
        [
            np.asarray(terms.project(rows[:, i : i + group_size], axis=1, **options))
            for i in range(0, shape[axis], group_size)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(np.moveaxis(v, axis, -1).reshape(rows.shape), expected)


def test_large_groups_use_the_exact_comparison():
    w = np.random.default_rng(0).integers(-127, 128, size=(200, 3)).astype(np.int32)
    v = project(w, 100)
    for column in range(3):
        error = np.sum((w[:, column] - v[:, column]) ** 2)
        assert error == least_error(w[:, column], 100, "naf", 8, None, np.ones(200))


def test_one_compilation_serves_every_budget():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)) * 40, jnp.float32)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(w, budget):
        return terms.project(w, group_size=8, budget=budget, axis=0)

    for budget in (0, 3, 8, 32):
        expected = terms.project(w, group_size=8, budget=budget, axis=0)
        chex.assert_trees_all_equal(run(w, jnp.int32(budget)), expected)


class Jitted(chex.TestCase):
    """The public functions under `jax.jit`, with static options closed over, and without."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_project(self):
        w = jnp.asarray(np.random.default_rng(6).normal(size=(5, 19)) * 40, jnp.float32)
        for method, encoding in (("optimal", "naf"), ("optimal", "hese"), ("greedy", "naf")):
            options = {"group_size": 8, "axis": 1, "method": method, "encoding": encoding}
            run = self.variant(functools.partial(terms.project, **options))
            v = run(w, budget=jnp.int32(9))
            chex.assert_shape(v, w.shape)
            chex.assert_type(v, jnp.int32)
            held = terms.GroupLayout(8, axes=(1,)).sums(terms.count(v, encoding))
            assert int(held.max()) <= 9
            for start in (0, 8, 16):  # each group on its own
                group = np.asarray(w)[:, start : start + 8]
                alone = terms.project(group, budget=9, **options)
                chex.assert_trees_all_equal(v[:, start : start + 8], alone)

    @chex.variants(with_jit=True, without_jit=True)
    def test_quantizers(self):
        w = jnp.asarray(np.random.default_rng(7).normal(size=(12, 4)), jnp.float32)
        scale = terms.max_scale(w, axes=(0,))
        fmt = terms.WeightFormat(group_size=4)
        quantize = functools.partial(terms.quantize_weights, axes=(0,), fmt=fmt)
        v = terms.project(w / scale, group_size=4, budget=5, axis=0, limit=127)
        q = self.variant(quantize)(w, scale, jnp.int32(5))
        chex.assert_trees_all_close(q, scale * v.astype(jnp.float32), rtol=1e-6)
        x = self.variant(functools.partial(terms.quantize_activations, terms=2))(w, scale)
        limited = terms.limit_terms(jnp.round(w / scale), 2)
        chex.assert_trees_all_close(x, scale * limited, rtol=1e-6)


def test_vmap_over_budgets_and_weights():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 16, 4)) * 40, jnp.float32)
    budgets = jnp.asarray([2, 8, 30])

    def one(w, budget):
        return terms.project(w, group_size=8, budget=budget, axis=0)

    together = jax.vmap(one)(w, budgets)
    for i in range(3):
        np.testing.assert_array_equal(together[i], one(w[i], int(budgets[i])))


LAYOUTS = [((3, 20, 40), 1), ((24, 5), 0), ((7, 24), 1), ((2, 2, 9, 3), 2), ((8, 64), 0)]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize(
    ("method", "encoding"), [("optimal", "naf"), ("optimal", "binary"), ("greedy", "hese")]
)
def test_each_budget_of_many_acts_as_if_it_were_alone(shape, axis, method, encoding):
    rng = np.random.default_rng(8)
    w = rng.normal(size=shape).astype(np.float32) * 40
    apart = tuple(1 if a == axis else n for a, n in enumerate(shape))
    budgets = rng.choice([0, 3, 8, 13, terms.max_budget(8, encoding)], apart)
    options = {"group_size": 8, "axis": axis, "method": method, "encoding": encoding}
    together = terms.project(w, budget=budgets, **options)
    for budget in np.unique(budgets):
        alone = terms.project(w, budget=int(budget), **options)
        equal = terms.project(w, budget=np.full(apart, budget), **options)
        np.testing.assert_array_equal(equal, alone)
        mine = np.broadcast_to(budgets == budget, shape)
        np.testing.assert_array_equal(np.asarray(together)[mine], np.asarray(alone)[mine])


def test_one_compilation_serves_every_budget_by_filter():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)) * 40, jnp.float32)

    @jax.jit
    @chex.assert_max_traces(1)
    def run(w, budget):
        return terms.project(w, group_size=8, budget=budget, axis=0)

    budgets = np.random.default_rng(2).integers(0, 33, (4, 8)).astype(np.int32)
    for row in budgets:
        expected = terms.project(w, group_size=8, budget=row, axis=0)
        chex.assert_trees_all_equal(run(w, row), expected)
    every = jax.vmap(lambda row: terms.project(w, group_size=8, budget=row, axis=0))(budgets)
    chex.assert_trees_all_equal(every[2], run(w, budgets[2]))


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_curves_kept_apart_are_those_of_the_parts(shape, axis):
    w = np.random.default_rng(9).normal(size=shape).astype(np.float32) * 40
    last = len(shape) - 1 if axis != len(shape) - 1 else 0
    curves = terms.error_curve(w, group_size=8, axis=axis, apart=(last,))
    assert curves.shape == (shape[last], 33)
    for i in (0, shape[last] - 1):
        part = np.take(w, [i], axis=last)
        alone = terms.error_curve(part, group_size=8, axis=axis)
        np.testing.assert_allclose(curves[i], alone, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match="sums over the reduction"):
        terms.error_curve(w, group_size=8, axis=axis, apart=(axis,))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.int16])
def test_other_dtypes_are_their_values(dtype):
    w = (jnp.arange(-16, 16) * 4).astype(dtype)
    expected = terms.project(w.astype(jnp.float32), group_size=8, budget=6, axis=0)
    np.testing.assert_array_equal(terms.project(w, group_size=8, budget=6, axis=0), expected)


def test_x64_inputs():
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(3).normal(size=(16,)) * 40, jnp.float64)
        v = terms.project(w, group_size=8, budget=6, axis=0)
        assert v.dtype == jnp.int32


def test_error_curve_is_the_error_of_each_budget():
    w = np.random.default_rng(4).normal(size=(20, 6)) * 40
    weights = np.random.default_rng(5).uniform(0.5, 2, size=w.shape)
    w, weights = w.astype(np.float32), weights.astype(np.float32)
    curve = terms.error_curve(w, group_size=8, axis=0, limit=127, importance=weights)
    clipped = np.clip(w, -127, 127)
    for budget in range(33):
        v = terms.project(w, group_size=8, budget=budget, axis=0, limit=127, importance=weights)
        error = float(np.sum(weights * (clipped - np.asarray(v)) ** 2))
        assert float(curve[budget]) == pytest.approx(error, rel=1e-4, abs=1e-3)
    assert np.all(np.diff(np.diff(curve)) >= -1e-3 * curve[0])


def test_a_method_and_an_encoding_of_ones_own(monkeypatch):
    """Records under a new name serve weights and activations; nothing else has to know them."""

    def first_signs(groups, budget, importance, encoding, bits, limit):
        held = jnp.cumsum(groups != 0, axis=1)
        return jnp.where(held <= budget, jnp.sign(groups), 0).astype(jnp.int32)

    method = terms.ProjectionMethod(groups=first_signs, importance=False)
    monkeypatch.setitem(terms.METHODS, "signs", method)
    monkeypatch.setitem(terms.ENCODINGS, "unary", terms.EncodingRule(planes=lambda q: (q, q)))
    options = {"group_size": 4, "axis": 0, "method": "signs", "encoding": "unary"}
    v = terms.project([0.0, -7.0, 3.0, 9.0, 5.0], budget=2, **options)
    assert v.tolist() == [0, -1, 1, 0, 1]
    assert terms.limit_terms([5, -9], 1, method="signs").tolist() == [1, -1]
    with pytest.raises(ValueError, match="signs takes no importance; use method='optimal'"):
        terms.project([1.0], budget=1, importance=jnp.ones(1), **options)
    only_naf = terms.ProjectionMethod(groups=first_signs, takes=lambda rule: rule.convex)
    monkeypatch.setitem(terms.METHODS, "signs", only_naf)
    with pytest.raises(ValueError, match="signs takes the encodings naf, not unary"):
        terms.project([1.0], budget=1, **options)


def test_empty_weights():
    assert terms.project(jnp.zeros((0, 3)), group_size=8, budget=3, axis=0).shape == (0, 3)


BAD = [
    ({"budget": -1}, ValueError, r"budget -1 is outside \[0, 16\]"),
    ({"budget": 17}, ValueError, r"budget 17 is outside \[0, 16\]"),
    ({"budget": 1.5}, TypeError, "budgets are integers"),
    (
        {"budget": np.array([1, 2])},
        ValueError,
        r"budgets of shape \(2,\) do not broadcast to \(1,\)",
    ),
    ({"budget": np.array([2, 17])}, ValueError, r"budget 17 is outside \[0, 16\]"),
    ({"group_size": 0}, ValueError, "group_size must be a positive integer"),
    ({"group_size": 2.0}, ValueError, "group_size must be a positive integer"),
    ({"axis": 1}, ValueError, "axis 1 does not exist"),
    ({"method": "best"}, ValueError, "unknown method 'best'"),
    ({"encoding": "csd"}, ValueError, "unknown encoding 'csd'"),
    ({"bits": 0}, ValueError, "bits must be"),
    ({"limit": 100}, ValueError, "limit must be 127"),
    ({"importance": jnp.ones((3,))}, ValueError, "does not broadcast"),
    ({"importance": jnp.ones((4,)), "method": "greedy"}, ValueError, "use method='optimal'"),
    ({"w": jnp.ones((4,), jnp.complex64)}, TypeError, "must be real numbers"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {"w": jnp.ones((4,)), "group_size": 4, "budget": 2, "axis": 0} | change
    w = arguments.pop("w")
    with pytest.raises(error, match=message):
        terms.project(w, **arguments)

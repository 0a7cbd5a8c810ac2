"""Budgets by layer and filter: exact on convex curves of equal cost, and never above the total."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax.terms import allocate_budgets, round_budgets

# Falling gains, summed from the far end: a convex, non-increasing curve that ends at 0.
GAINS = st.lists(st.integers(0, 50), min_size=2, max_size=5)
CURVES = st.lists(
    GAINS.map(lambda gains: np.append(np.cumsum(sorted(gains))[::-1], 0)), min_size=1, max_size=3
)


def named(curves):
    return {f"layer{i}": curve for i, curve in enumerate(curves)}


def error(curves, budgets):
    return sum(float(curves[name][k]) for name, k in budgets.items())


@settings(max_examples=100)
@given(CURVES, st.integers(0, 12), st.integers(0, 1))
def test_equal_costs_give_the_least_error_of_all_allocations(curves, spare, minimum):
    curves = named(curves)
    total = len(curves) * minimum + spare
    found = allocate_budgets(curves, dict.fromkeys(curves, 1), total, minimum=minimum)
    assert sum(found.values()) <= total
    assert min(found.values()) >= minimum
    best = min(
        error(curves, dict(zip(curves, ks, strict=True)))
        for ks in itertools.product(*(range(minimum, len(c)) for c in curves.values()))
        if sum(ks) <= total
    )
    assert error(curves, found) == best


@settings(max_examples=100)
@given(CURVES, st.integers(0, 12), st.integers(1, 3), st.integers(0, 1))
def test_budgets_in_steps_give_the_least_error_of_all_multiples(curves, spare, step, minimum):
    """The end of a curve counts as a whole step."""
    curves = named(curves)
    steps = {name: [*range(0, len(c) - 1, step), len(c) - 1] for name, c in curves.items()}
    total = step * len(curves) * minimum + spare
    costs = dict.fromkeys(curves, 1)
    found = allocate_budgets(curves, costs, total, minimum=minimum, step=step)
    spent = sum(-(-k // step) * step for k in found.values())
    assert spent <= total
    assert all(k in steps[name] and k >= minimum for name, k in found.items())
    best = min(
        error(curves, {name: steps[name][i] for name, i in zip(curves, taken, strict=True)})
        for taken in itertools.product(*(range(minimum, len(s)) for s in steps.values()))
        if step * sum(taken) <= total
    )
    assert error(curves, found) == best


@settings(max_examples=100)
@given(CURVES, st.data())
def test_unequal_costs_stay_within_the_total_and_leave_no_free_gain(curves, data):
    curves = named(curves)
    costs = {name: data.draw(st.floats(0.5, 8.0)) for name in curves}
    total = data.draw(st.floats(0.0, 60.0))
    found = allocate_budgets(curves, costs, total, minimum=0)
    spent = sum(costs[name] * k for name, k in found.items())
    assert spent <= total * (1 + 1e-9) + 1e-9
    for name, k in found.items():  # whatever still helps costs more than what is left
        if k + 1 < len(curves[name]) and curves[name][k] > curves[name][k + 1]:
            assert costs[name] > total - spent - 1e-9


def test_no_allocation_of_what_it_spent_is_better():
    """The water level: whatever the costs, what it spends buys the least error."""
    curves = {"cheap": np.array([12, 6, 2, 0]), "dear": np.array([40, 16, 4, 0])}
    costs = {"cheap": 1.0, "dear": 3.0}
    for total in (0.0, 3.0, 4.0, 7.0, 8.0):
        found = allocate_budgets(curves, costs, total, minimum=0)
        spent = sum(costs[name] * k for name, k in found.items())
        best = min(
            curves["cheap"][i] + curves["dear"][j]
            for i, j in itertools.product(range(4), repeat=2)
            if i * 1.0 + j * 3.0 <= spent
        )
        assert error(curves, found) == best


def test_useless_terms_are_not_bought():
    curve = [5.0, 1.0, 1.0, 1.0]
    assert allocate_budgets({"a": curve}, {"a": 1}, 3) == {"a": 1}


def test_ties_go_to_the_layer_named_first():
    curve = [4.0, 2.0, 0.0]
    assert allocate_budgets({"b": curve, "a": curve}, {"a": 1, "b": 1}, 3) == {"b": 2, "a": 1}


FILTERS = st.lists(GAINS.map(sorted), min_size=1, max_size=4)


@settings(max_examples=100)
@given(st.lists(FILTERS, min_size=1, max_size=3), st.integers(1, 4))
def test_by_filter_the_error_is_no_larger_than_by_layer_at_the_same_total(layers, terms):
    """Each filter has one group; a layer's curve is the sum of its filters'."""
    most = max(len(gains) for filters in layers for gains in filters)
    by_filter = named(
        np.array([np.append(np.cumsum([0] * (most - len(g)) + g)[::-1], 0) for g in filters])
        for filters in layers
    )
    by_layer = {name: curves.sum(0) for name, curves in by_filter.items()}
    costs = {name: len(curves) for name, curves in by_filter.items()}
    total = sum(costs.values()) * min(terms, most)
    layer = allocate_budgets(by_layer, costs, total, minimum=0)
    filters = allocate_budgets(by_filter, costs, total, minimum=0)
    assert sum(k.sum() for k in filters.values()) <= total
    found = sum(
        curves[np.arange(len(curves)), filters[name]].sum() for name, curves in by_filter.items()
    )
    assert found <= error(by_layer, layer)


def test_a_filter_is_a_layer_of_its_own():
    rng = np.random.default_rng(0)
    curves = np.cumsum(np.sort(rng.uniform(0, 9, (5, 12)), axis=1), axis=1)[:, ::-1]
    costs = rng.uniform(0.5, 2.0, 5)
    apart = allocate_budgets(named(curves), named(costs), 30.0, minimum=0)
    together = allocate_budgets({"all": curves}, {"all": costs}, 30.0, minimum=0)
    assert together["all"].tolist() == list(apart.values())


def test_a_single_number_is_shared_equally_by_the_filters():
    rng = np.random.default_rng(1)
    curves = np.cumsum(np.sort(rng.uniform(0, 9, (7, 12)), axis=1), axis=1)[:, ::-1]
    for cost in (0.3, 1.0, 7.1):
        found = allocate_budgets({"a": curves}, {"a": cost}, 4 * cost)
        assert found["a"].sum() == 4 * 7


def test_mistakes_are_named():
    curve = [2.0, 1.0]
    with pytest.raises(
        ValueError, match=r"'a': costs of shape \(3,\) for curves of shape \(2, 2\)"
    ):
        allocate_budgets({"a": np.array([curve, curve])}, {"a": np.ones(3)}, 3)
    with pytest.raises(ValueError, match="only one has b"):
        allocate_budgets({"a": curve}, {"a": 1, "b": 1}, 3)
    with pytest.raises(ValueError, match="'a': the cost of a term must be positive"):
        allocate_budgets({"a": curve}, {"a": 0}, 3)
    with pytest.raises(ValueError, match="does not reach the minimum budget 1"):
        allocate_budgets({"a": curve, "b": curve}, {"a": 1, "b": 1}, 1)
    with pytest.raises(ValueError, match=r"minimum 2 is outside its budgets \[0, 1\]"):
        allocate_budgets({"a": curve}, {"a": 1}, 3, minimum=2)
    with pytest.raises(ValueError, match="step must be 1 or more, got 0"):
        allocate_budgets({"a": curve}, {"a": 1}, 3, step=0)
    with pytest.raises(ValueError, match="does not reach the minimum budget 2"):
        allocate_budgets({"a": [3.0, 2.0, 1.0]}, {"a": 1}, 1, step=2)


def test_rounded_budgets_are_the_nearest_that_the_total_allows():
    relaxed, costs = {"a": 2.7, "b": 5.2, "c": 0.1}, {"a": 1.0, "b": 1.0, "c": 1.0}
    assert round_budgets(relaxed, costs, 100, largest=8) == {"a": 3, "b": 5, "c": 1}
    tight = round_budgets(relaxed, costs, 8, largest=8)
    assert sum(tight.values()) == 8
    distances = {
        ks: sum((k - b) ** 2 for k, b in zip(ks, relaxed.values(), strict=True))
        for ks in itertools.product(range(1, 9), repeat=3)
        if sum(ks) <= 8
    }
    assert tuple(tight.values()) == min(distances, key=distances.get)
    assert round_budgets({"a": 12.0}, {"a": 1.0}, 100, largest=8) == {"a": 8}


def test_rounded_budgets_by_filter():
    relaxed = {"a": np.array([2.7, 5.2]), "b": 0.1}
    found = round_budgets(relaxed, {"a": 2.0, "b": 1.0}, 7, largest=8)
    assert (found["a"].tolist(), found["b"]) == ([2, 4], 1)

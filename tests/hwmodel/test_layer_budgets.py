"""Budgets by filter on the array: each filter streams its own k, and the rest follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SMALL, random_weights, resnet18

from stp_jax import hwmodel, terms

ARRAY = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=8))


def by_filter(network, low=0, high=20, seed=0):
    rng = np.random.default_rng(seed)
    return {la.name: rng.integers(low, high, la.filters).astype(float) for la in network}


def same(ours, theirs, **tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 0, **tolerance})


def test_a_fold_takes_its_fill_and_the_sum_of_its_filters_terms():
    network, pe = resnet18(), hwmodel.GroupPE(group_size=8)
    budgets = by_filter(network, low=1)
    report = hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=16, pe=pe), budgets=budgets)
    K, P = (network.extents(name) for name in "KP")
    folds = np.ceil(K / (32 * 8)) * np.ceil(P / 16)
    streamed = [budgets[name].sum() for name in network.names]
    np.testing.assert_array_equal(report.cycles, folds * (2 * 32 + 16 - 2 + np.array(streamed)))
    np.testing.assert_allclose(report.budgets, [budgets[name].mean() for name in network.names])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_budgets_by_filter_are_one_by_layer(packed, weighted, smoothing):
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=8, packed=packed))
    options = {"weights": random_weights(SMALL) if weighted else None, "smoothing": smoothing}
    one = hwmodel.evaluate(SMALL, array, budgets=24, **options)
    equal = {layer.name: np.full(layer.filters, 24) for layer in SMALL}
    exact = {} if smoothing == 0.0 else {"rtol": 1e-12}
    same(hwmodel.evaluate(SMALL, array, budgets=equal, **options), one, **exact)


@pytest.mark.parametrize("packed", [False, True])
def test_counts_are_the_sums_of_layers_that_have_one_filter_each(packed):
    """A dense layer, and the same filters as layers of their own, which load their inputs again."""
    pe = hwmodel.GroupPE(group_size=8, packed=packed)
    array, rng = hwmodel.Array(rows=4, cols=4, pe=pe), np.random.default_rng(0)
    budgets = rng.integers(0, 14, 10)
    w = terms.project(rng.normal(0, 40, (44, 10)), group_size=8, budget=budgets, axis=0)
    weights = np.asarray(w)
    whole = hwmodel.Network((hwmodel.dense("fc", 44, 10, rows=6),))
    parts = hwmodel.Network(tuple(hwmodel.dense(f"f{i}", 44, 1, rows=6) for i in range(10)))
    for given in (False, True):
        one = hwmodel.evaluate(
            whole, array, budgets={"fc": budgets}, weights={"fc": weights} if given else None
        )
        many = hwmodel.evaluate(
            parts,
            array,
            budgets=list(budgets),
            weights={f"f{i}": weights[:, [i]] for i in range(10)} if given else None,
        )
        folds = 2 * 2
        streamed = np.maximum(budgets, 1).sum()
        assert one.total_cycles == folds * (2 * 4 + 4 - 2 + streamed)
        assert one.operations["terms"].sum() == many.operations["terms"].sum()
        for name in ("array", "encoder"):
            assert one.energy_pj[name].sum() == pytest.approx(many.energy_pj[name].sum())
        read = many.sram_bytes["filter"].sum()
        assert one.sram_bytes["filter"].sum() == pytest.approx(read)


def test_depthwise_filters_have_budgets_of_their_own():
    layer = hwmodel.conv("c", (6, 6), channels=5, filters=5, kernel=(3, 3), groups=5)
    array = hwmodel.Array(rows=2, cols=64, pe=hwmodel.GroupPE(group_size=8))
    k = np.array([1, 4, 2, 9, 3])
    report = hwmodel.evaluate(hwmodel.Network((layer,)), array, budgets={"c": k})
    assert report.total_cycles == 5 * (2 * 2 + 64 - 2) + k.sum()


def test_jit_vmap_and_sweep_agree_with_the_exact_evaluation():
    weights = hwmodel.measure_terms(SMALL, random_weights(SMALL, scale=3.0), ARRAY.pe)
    first = next(iter(SMALL)).name
    every = [by_filter(SMALL, 22, 33, seed) | {first: np.float64(30)} for seed in range(3)]

    def design(budgets):
        return hwmodel.evaluate(SMALL, ARRAY, budgets=budgets, weights=weights)

    stacked = jax.tree.map(lambda *k: jnp.asarray(np.stack(k), jnp.float32), *every)
    together = jax.jit(jax.vmap(design))(stacked)
    swept = hwmodel.sweep(SMALL, {"rows": [8] * 3, "cols": [12] * 3, "budgets": stacked})
    for i, budgets in enumerate(every):
        exact = design(budgets)
        np.testing.assert_array_equal(together.cycles[i], exact.cycles)
        assert swept["cycles"][i] == exact.total_cycles
        for name, energy in exact.energy_pj.items():
            np.testing.assert_allclose(together.energy_pj[name][i], energy, rtol=1e-5)


def test_the_gradient_of_relaxed_budgets_is_each_filter_s_cycles():
    def cycles(budgets):
        return hwmodel.evaluate(SMALL, ARRAY, budgets=budgets, smoothing=0.01).total_cycles

    budgets = jax.tree.map(lambda k: jnp.asarray(k, jnp.float32), by_filter(SMALL, 3, 20))
    found = jax.grad(cycles)(budgets)
    by_layer = jax.grad(cycles)({name: k.mean() for name, k in budgets.items()})
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient.sum(), by_layer[name], rtol=1e-3)
        np.testing.assert_allclose(gradient, gradient.mean(), rtol=1e-2)


def test_mistakes_are_named():
    (first, *_), name = SMALL.layers, SMALL.names[0]
    with pytest.raises(ValueError, match=rf"{name}: budgets of shape \(3,\); give one, or one for"):
        hwmodel.evaluate(SMALL, ARRAY, budgets={name: np.ones(3)})
    wrong = np.full(first.filters, 8.0)
    wrong[2] = 2.5
    with pytest.raises(ValueError, match=f"{name}, filter 2: a budget must be a whole number"):
        hwmodel.evaluate(SMALL, ARRAY, budgets={name: wrong})
    wrong[:] = 32
    wrong[1] = 1
    with pytest.raises(ValueError, match=f"{name}, filter 1: a group of its weights holds"):
        hwmodel.evaluate(SMALL, ARRAY, budgets={name: wrong}, weights=random_weights(SMALL))
    for dataflow in ("ws", "os"):
        array = hwmodel.Array(rows=8, cols=12, dataflow=dataflow, pe=hwmodel.GroupPE())
        with pytest.raises(ValueError, match="need the input-stationary dataflow"):
            hwmodel.evaluate(SMALL, array, budgets={name: np.full(first.filters, 8)})
    with pytest.raises(ValueError, match=f"budgets of {name} has shape"):
        hwmodel.sweep(SMALL, {"budgets": {name: np.ones((2, 3))}})

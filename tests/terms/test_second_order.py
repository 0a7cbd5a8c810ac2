"""Second-order projection against every value of small layers, and what never gets worse."""

import itertools

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
    project_compensated,
    project_second_order,
    search_output_scale,
)

SMALL = WeightFormat(group_size=2, bits=4)


def problem(seed, groups=3, size=4, outputs=5, spread=40.0):
    """Weights in integer units and the gram of inputs that go together."""
    rng = np.random.default_rng(seed)
    k = groups * size
    mixed = rng.normal(size=(200, k)) @ (np.eye(k) + 0.5 * rng.normal(size=(k, k)))
    w = rng.normal(size=(groups, size, outputs)) * spread
    return w.astype(np.float32), (mixed.T @ mixed / 200).astype(np.float32)


def damp(gram, damping=0.01):
    return gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))


def errors(w, scale, integers, gram):
    rows = (w - np.asarray(scale) * np.asarray(integers)).reshape(len(gram), -1).astype(np.float64)
    return np.sum(rows * (damp(gram.astype(np.float64)) @ rows), axis=0)


def every_kernel(fmt, groups, budget):
    """All integers of one output whose groups fit the budget, [choices, groups * size]."""
    values = np.arange(-fmt.largest, fmt.largest + 1)
    points = np.array(list(itertools.product(values, repeat=fmt.group_size)))
    points = points[np.asarray(count(points, bits=fmt.bits)).sum(1) <= budget]
    choices = itertools.product(range(len(points)), repeat=groups)
    return points[np.array(list(choices))].reshape(-1, groups * fmt.group_size)


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_small_layers_come_near_the_best_of_all_kernels(budget):
    every = every_kernel(SMALL, 2, budget)
    best_sum, our_sum, old_sum = 0.0, 0.0, 0.0
    for seed in range(6):
        w, gram = problem(seed, groups=2, size=2, outputs=4, spread=4.0)
        flat = w.reshape(4, -1)
        difference = flat.T[:, None] - every[None]
        best = np.einsum("opi,ij,opj->op", difference, damp(gram), difference).min(1)
        found = project_second_order(
            w, jnp.ones(4), gram, budget, fmt=SMALL, sweeps=3, fit_scale=False
        )
        ours = errors(w, np.ones(4), found.integers, gram)
        assert np.all(ours >= best * (1 - 1e-4))
        old = project_compensated(w, jnp.ones(4), gram, budget, fmt=SMALL)
        best_sum, our_sum = best_sum + best.sum(), our_sum + ours.sum()
        old_sum += errors(w, np.ones(4), old, gram).sum()
    assert our_sum - best_sum < 0.5 * (old_sum - best_sum)


def test_one_group_is_the_lattice_search():
    """With the list unbounded and a single group, the sequence is exact."""
    fmt = WeightFormat(group_size=2, bits=5)
    every = every_kernel(fmt, 1, 3)
    w, gram = problem(3, groups=1, size=2, outputs=8, spread=9.0)
    found = project_second_order(
        w, jnp.ones(8), gram, 3, fmt=fmt, beam=32, neighbours=32, sweeps=0, fit_scale=False
    )
    difference = w.reshape(2, -1).T[:, None] - every[None]
    best = np.einsum("opi,ij,opj->op", difference, damp(gram), difference).min(1)
    np.testing.assert_allclose(errors(w, np.ones(8), found.integers, gram), best, rtol=1e-4)


@pytest.mark.parametrize("budget", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_output_is_worse_than_by_the_diagonal_and_no_sweep_raises_an_error(budget, seed):
    fmt = WeightFormat(group_size=4)
    w, gram = problem(seed, groups=6, outputs=12)
    scale = np.full(12, 0.7, np.float32)
    old = project_compensated(w, jnp.asarray(scale), gram, budget, fmt=fmt)
    plain = project(w / scale, group_size=4, budget=budget, axis=1, limit=127)
    last = np.minimum(errors(w, scale, old, gram), np.inf)
    for sweeps, fit_scale in ((0, False), (1, False), (2, False), (2, True)):
        found = project_second_order(
            w, jnp.asarray(scale), gram, budget, fmt=fmt, sweeps=sweeps, fit_scale=fit_scale
        )
        assert int(jnp.max(jnp.sum(count(found.integers), axis=1))) <= budget
        assert int(jnp.max(jnp.abs(found.integers))) <= fmt.largest
        ours = errors(w, found.scale, found.integers, gram)
        np.testing.assert_allclose(found.error, ours, rtol=1e-2, atol=1e-2)
        if not fit_scale:
            assert np.all(ours <= last * (1 + 1e-4))
            last = ours
    assert np.sum(ours) < 0.7 * np.sum(errors(w, scale, plain, gram))
    assert np.sum(ours) < np.sum(last)


@pytest.mark.parametrize("budget", [2, 4])
def test_the_searched_scale_is_the_best_of_those_tried(budget):
    fmt = WeightFormat(group_size=4)
    w, gram = problem(1, groups=4, outputs=6)
    found = search_output_scale(w, gram, budget, fmt=fmt, candidates=5, lowest=1.0, highest=2.0)
    peak = np.asarray(max_scale(w, axes=(0, 1)))[0, 0]

    def error(scale):
        v = project_compensated(w, jnp.asarray(scale), gram, budget, fmt=fmt)
        return errors(w, scale, v, gram)

    tried = [error(peak * np.float32(ratio)) for ratio in np.geomspace(1, 2, 5)]
    np.testing.assert_allclose(error(found), np.min(tried, axis=0), rtol=1e-3)


def test_padding_stays_empty_and_budgets_are_traced():
    fmt = WeightFormat(group_size=4)
    w, gram = problem(0, groups=3)
    w[-1, 2:], gram[-2:], gram[:, -2:] = 0, 0, 0
    solve = jax.jit(
        chex.assert_max_traces(
            lambda k: project_second_order(w, jnp.ones(5), gram, k, fmt=fmt, sweeps=1), n=1
        )
    )
    for budget in (3, 6):
        found = solve(budget)
        assert not np.any(found.integers[-1, 2:])
        direct = project_second_order(w, jnp.ones(5), gram, budget, fmt=fmt, sweeps=1)
        np.testing.assert_allclose(found.error.sum(), direct.error.sum(), rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((3, 5, 2), np.float32)}, r"w must be \[groups, 4"),
        ({"gram": np.eye(7, dtype=np.float32)}, "gram must be"),
        ({"scale": np.ones(3, np.float32)}, "scale must be"),
        ({"budget": 99}, "outside"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"sweeps": -1}, "sweeps must be"),
        ({"fmt": WeightFormat(group_size=4, method="greedy")}, "must be 'optimal'"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    w, gram = problem(0)
    arguments = {"w": w, "scale": np.ones(5, np.float32), "gram": gram, "budget": 4}
    arguments |= {"fmt": WeightFormat(group_size=4)} | change
    positional = [arguments.pop(name) for name in ("w", "scale", "gram", "budget")]
    with pytest.raises(ValueError, match=message):
        project_second_order(*positional, **arguments)

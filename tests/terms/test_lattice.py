"""The lattice search against every point of small lattices, and its certificates."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.terms import WeightFormat, count, project
from stp_jax.terms.lattice import nearest_points

EVERY = 2**8


def problem(seed, size, largest, outputs=24, mixing=0.7):
    """Targets over the whole range and a little beyond, and a well-coupled curvature."""
    rng = np.random.default_rng(seed)
    root = np.eye(size) + mixing * rng.normal(size=(size, size))
    target = rng.uniform(-1.2 * largest, 1.2 * largest, (outputs, size))
    return target.astype(np.float32), (root.T @ root + 0.05 * np.eye(size)).astype(np.float32)


def every_point(fmt):
    values = np.arange(-fmt.largest, fmt.largest + 1)
    points = np.array(list(itertools.product(values, repeat=fmt.group_size)))
    terms = np.asarray(count(values, fmt.encoding, fmt.bits))
    return points, terms[points + fmt.largest].sum(1)


def least_costs(target, curvature, budget, fmt):
    points, terms = every_point(fmt)
    points = points[terms <= budget]
    error = target.astype(np.float64)[:, None] - points
    return np.einsum("opi,ij,opj->op", error, curvature.astype(np.float64), error).min(1)


def cost(target, curvature, values):
    error = target.astype(np.float64) - np.asarray(values)
    return np.einsum("oi,ij,oj->o", error, curvature.astype(np.float64), error)


SMALL = [(2, 6, 4), (3, 4, 5), (4, 3, 4), (4, 3, 7)]  # group size, bits, budget


@pytest.mark.parametrize(("size", "bits", "budget"), SMALL)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("encoding", ["naf", "binary"])
def test_unbounded_lists_find_and_certify_the_optimum(size, bits, budget, seed, encoding):
    fmt = WeightFormat(group_size=size, bits=bits, encoding=encoding)
    target, curvature = problem(seed, size, fmt.largest)
    beam = (2 * fmt.largest + 1) ** (size - 1)
    found = nearest_points(target, curvature, budget, fmt=fmt, beam=beam, neighbours=EVERY)
    best = least_costs(target, curvature, budget, fmt)
    np.testing.assert_allclose(cost(target, curvature, found.values), best, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.cost, best, rtol=1e-4, atol=1e-3)
    assert bool(found.optimal.all())


@pytest.mark.parametrize(("size", "bits", "budget"), SMALL)
@pytest.mark.parametrize("beam", [1, 3, 12])
def test_every_certificate_is_true(size, bits, budget, beam):
    certified, sure = 0, 0
    fmt = WeightFormat(group_size=size, bits=bits)
    for seed, mixing in itertools.product(range(4), (0.1, 0.7)):
        target, curvature = problem(seed, size, fmt.largest, outputs=40, mixing=mixing)
        found = nearest_points(target, curvature, budget, fmt=fmt, beam=beam)
        ours = cost(target, curvature, found.values)
        best = least_costs(target, curvature, budget, fmt)
        assert np.all(ours >= best - 1e-4)
        optimal = np.asarray(found.optimal)
        np.testing.assert_allclose(ours[optimal], best[optimal], rtol=1e-5, atol=1e-4)
        certified, sure = certified + optimal.size, sure + int(optimal.sum())
    assert sure > (0.05 if beam == 1 else 0.3) * certified


@pytest.mark.parametrize("beam", [1, 4, 16])
@pytest.mark.parametrize("budget", [0, 4, 8, 16, 32])
def test_budget_and_range_hold_and_errors_are_no_larger_than_by_the_diagonal(beam, budget):
    fmt = WeightFormat()
    target, curvature = problem(budget, 8, 127, outputs=64)
    found = nearest_points(target, curvature, budget, fmt=fmt, beam=beam)
    assert int(jnp.max(jnp.sum(count(found.values), axis=1))) <= budget
    assert int(jnp.max(jnp.abs(found.values))) <= 127
    plain = project(
        target, group_size=8, budget=budget, axis=1, limit=127, importance=np.diag(curvature)
    )
    ours, diagonal = (cost(target, curvature, v) for v in (found.values, plain))
    assert np.all(ours <= diagonal * (1 + 1e-6))
    if 0 < budget < 32:
        assert np.mean(ours) < 0.95 * np.mean(diagonal)


def test_wider_beams_cost_less_on_average():
    target, curvature = problem(5, 8, 127, outputs=256)
    means = [
        float(jnp.mean(nearest_points(target, curvature, 8, fmt=WeightFormat(), beam=k).cost))
        for k in (1, 4, 16, 64)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > means[2]


@pytest.mark.parametrize("encoding", ["naf", "binary"])
@pytest.mark.parametrize("budget", [3, 8, 17])
def test_with_a_diagonal_curvature_it_is_the_projection(encoding, budget):
    rng = np.random.default_rng(budget)
    fmt = WeightFormat(encoding=encoding)
    # Beyond the range they differ: `project` clips weights first, the search pays for the distance.
    target = np.clip(rng.normal(size=(32, 8)).astype(np.float32) * 50, -127, 127)
    weight = rng.uniform(0.2, 5, 8).astype(np.float32)
    found = nearest_points(target, np.diag(weight), budget, fmt=fmt, beam=1)
    plain = project(
        target, group_size=8, budget=budget, axis=1, limit=127, importance=weight, encoding=encoding
    )
    np.testing.assert_array_equal(found.values, plain)


def test_budgets_are_traced_and_the_order_of_members_is_free():
    target, curvature = problem(9, 8, 127)
    traced = chex.assert_max_traces(
        lambda k: nearest_points(target, curvature, k, fmt=WeightFormat()), n=1
    )
    solve = jax.jit(traced)
    for budget in (4, 9):
        np.testing.assert_array_equal(
            solve(budget).values,
            nearest_points(target, curvature, budget, fmt=WeightFormat()).values,
        )
    turn = np.random.default_rng(0).permutation(8)
    turned = nearest_points(target[:, turn], curvature[np.ix_(turn, turn)], 8, fmt=WeightFormat())
    np.testing.assert_allclose(turned.cost, solve(8).cost, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": np.zeros((3, 5), np.float32)}, r"target must be \[outputs, 8\]"),
        ({"curvature": np.eye(7, dtype=np.float32)}, "curvature must be"),
        ({"budget": 99}, "outside"),
        ({"beam": 0}, "beam must be a positive integer"),
        ({"neighbours": 1.5}, "neighbours must be a positive integer"),
        ({"fmt": WeightFormat(method="greedy")}, "must be 'optimal'"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    target, curvature = problem(0, 8, 127)
    arguments = {"target": target, "curvature": curvature, "budget": 4, "fmt": WeightFormat()}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        nearest_points(
            arguments.pop("target"),
            arguments.pop("curvature"),
            arguments.pop("budget"),
            **arguments,
        )


def test_outputs_with_budgets_of_their_own_are_found_as_if_alone():
    fmt = WeightFormat(group_size=4)
    target, curvature = problem(5, 4, 127, outputs=6)
    budgets = np.array([1, 2, 4, 6, 9, 16])
    together = nearest_points(target, curvature, budgets, fmt=fmt, beam=4)
    for i, budget in enumerate(budgets):
        alone = nearest_points(target[[i]], curvature, int(budget), fmt=fmt, beam=4)
        np.testing.assert_array_equal(together.values[i], alone.values[0])
    with pytest.raises(ValueError, match=r"budget must be one or \(6,\)"):
        nearest_points(target, curvature, budgets[:2], fmt=fmt)

"""Compensated projection against the surgeon's update written out, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.terms import WeightFormat, count, project, project_compensated

FORMAT = WeightFormat(group_size=4)


def problem(seed, groups=3, size=4, outputs=5):
    """Weights in integer units and the gram of inputs that go together."""
    rng = np.random.default_rng(seed)
    k = groups * size
    mixed = rng.normal(size=(200, k)) @ (np.eye(k) + 0.5 * rng.normal(size=(k, k)))
    w = rng.normal(size=(groups, size, outputs)) * 40
    return w.astype(np.float32), (mixed.T @ mixed).astype(np.float32)


def by_surgeon(w, gram, budget, damping):
    """The same, one inverse per group, in float64."""
    groups, size, _ = w.shape
    gram = gram.astype(np.float64) + damping * np.mean(np.diag(gram)) * np.eye(groups * size)
    order = np.argsort(-np.diag(gram).reshape(groups, size).sum(1), kind="stable")
    w, result = w.astype(np.float64).copy(), np.zeros(w.shape, np.int32)
    left = list(order)
    while left:
        rows = np.concatenate([np.arange(j * size, (j + 1) * size) for j in left])
        inverse = np.linalg.inv(gram[np.ix_(rows, rows)])
        own = np.linalg.inv(inverse[:size, :size])
        first = left.pop(0)
        result[first] = project(
            w[first].astype(np.float32),
            group_size=size,
            budget=budget,
            axis=0,
            limit=127,
            importance=np.diag(own)[:, None].astype(np.float32),
        )
        move = inverse[size:, :size] @ own @ (w[first] - result[first])
        for place, j in enumerate(left):
            w[j] -= move[place * size : (place + 1) * size]
    return result


def output_error(gram, error):
    rows = np.asarray(error, np.float64).reshape(len(gram), -1)
    return np.sum(rows * (gram.astype(np.float64) @ rows))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 4, 9])
def test_equals_the_surgeons_update(seed, budget):
    w, gram = problem(seed)
    ours = project_compensated(w, jnp.ones(5), gram, budget, fmt=FORMAT, damping=0.05)
    np.testing.assert_array_equal(ours, by_surgeon(w, gram, budget, 0.05))


@pytest.mark.parametrize("budget", [2, 4, 6, 8])
def test_outputs_move_less_than_by_plain_projection(budget):
    ratios = []
    for seed in range(8):
        w, gram = problem(seed, groups=6)
        ours = np.asarray(project_compensated(w, jnp.ones(5), gram, budget, fmt=FORMAT))
        plain = np.asarray(project(w, group_size=4, budget=budget, axis=1, limit=127))
        assert int(jnp.max(jnp.sum(count(ours), axis=1))) <= budget
        ratios.append(output_error(gram, ours - w) / output_error(gram, plain - w))
    assert np.mean(ratios) < 0.85


def test_inputs_that_do_not_go_together_need_no_compensation():
    w, _ = problem(0)
    gram = np.eye(12, dtype=np.float32) * 3
    ours = project_compensated(w, jnp.ones(5), gram, 5, fmt=FORMAT)
    np.testing.assert_array_equal(ours, project(w, group_size=4, budget=5, axis=1, limit=127))


def test_scales_are_units_and_padding_spends_no_terms():
    w, gram = problem(1)
    w[2, 3] = 0
    gram[11, :] = gram[:, 11] = 0
    scale = np.array([0.5, 1, 2, 0.1, 3], np.float32)
    ours = project_compensated(w * scale, scale, gram, 4, fmt=FORMAT)
    np.testing.assert_array_equal(ours, project_compensated(w, jnp.ones(5), gram, 4, fmt=FORMAT))
    assert not np.any(ours[2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((3, 5, 5), np.float32)}, r"w must be \[groups, 4"),
        ({"gram": np.eye(11, dtype=np.float32)}, "gram must be"),
        ({"scale": np.ones(4, np.float32)}, "scale must be"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"budget": 99}, "outside"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    w, gram = problem(0)
    arguments = {"w": w, "scale": np.ones(5, np.float32), "gram": gram, "budget": 4} | change
    damping = arguments.pop("damping", 0.01)
    with pytest.raises(ValueError, match=message):
        project_compensated(*arguments.values(), fmt=FORMAT, damping=damping)


def test_outputs_with_budgets_of_their_own_are_projected_as_if_alone():
    w, gram = problem(3)
    scale, budgets = np.ones(5, np.float32), np.array([1, 3, 5, 8, 16])
    together = project_compensated(w, scale, gram, budgets, fmt=FORMAT)
    for i, budget in enumerate(budgets):
        alone = project_compensated(w[..., [i]], scale[:1], gram, int(budget), fmt=FORMAT)
        np.testing.assert_array_equal(together[..., [i]], alone)

"""The array behind AXI4-Streams: sums and cycles, with and without pauses on every stream."""

import numpy as np
import pytest

from stp_jax.hwmodel import rtl
from stp_jax.terms import project

needs_icarus = pytest.mark.skipif(
    not rtl.icarus_available(), reason="iverilog and vvp (Icarus Verilog) are not on PATH"
)


def random_job(rng, pixels, reduction, budgets, group_size):
    drawn = np.clip(np.round(rng.normal(scale=50, size=(len(budgets), reduction))), -127, 127)
    weights = project(
        drawn, group_size=group_size, budget=np.array(budgets)[:, None], axis=1, limit=127
    )
    activations = rng.integers(-128, 128, (pixels, reduction))
    return rtl.Job(weights=np.array(weights), activations=activations, budget=np.array(budgets))


@needs_icarus
@pytest.mark.parametrize(
    ("rows", "cols", "group_size", "pixels", "reduction", "budgets", "pauses"),
    [
        (1, 1, 4, 1, 3, [2], 0),
        (3, 4, 8, 7, 50, [3, 1, 4, 2, 6], 0),
        (2, 5, 4, 6, 20, [1, 1, 2], 8),
        (4, 2, 8, 3, 40, [5, 2], 13),
    ],
)
def test_sums_are_the_product_and_a_fold_without_pauses_takes_its_cycles(
    rows, cols, group_size, pixels, reduction, budgets, pauses
):
    job = random_job(np.random.default_rng(pixels), pixels, reduction, budgets, group_size)
    sizes = {"rows": rows, "cols": cols, "group_size": group_size}
    sums, cycles = rtl.simulate_stream(job, **sizes, depth=16, pauses=pauses)
    np.testing.assert_array_equal(sums, job.activations @ job.weights.T)
    folds = -(-reduction // (rows * group_size)) * -(-pixels // cols)
    least = folds * (2 * rows + cols - 2 + sum(budgets))
    assert cycles > least if pauses else cycles == least


@needs_icarus
def test_a_full_output_buffer_holds_the_slots_back_and_loses_nothing():
    job = random_job(np.random.default_rng(0), 2, 16, [1] * 9, 8)
    sizes = {"rows": 2, "cols": 2, "group_size": 8}
    deep, shallow = (rtl.simulate_stream(job, **sizes, depth=depth) for depth in (16, 2))
    np.testing.assert_array_equal(deep[0], shallow[0])
    assert shallow[1] > deep[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows and cols must be at least 1"),
        ({"depth": 3}, "depth must be a power of two"),
        ({"pauses": 16}, "pauses must be from 0 to 15"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    job = random_job(np.random.default_rng(0), 1, 8, [1], 8)
    with pytest.raises(ValueError, match=message):
        rtl.simulate_stream(job, **{"rows": 1, "cols": 1, "group_size": 8} | options)

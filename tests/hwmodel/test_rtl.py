"""The Verilog against arithmetic, and the accelerator model's cycles against the Verilog."""

import dataclasses
import re

import numpy as np
import pytest

from stp_jax.hwmodel import Array, GroupPE, Network, dense, evaluate, rtl
from stp_jax.terms import encode, project, slot_format

needs_icarus = pytest.mark.skipif(
    not rtl.icarus_available(), reason="iverilog and vvp (Icarus Verilog) are not on PATH"
)

# Rows, columns and group size of the arrays that the random jobs run on: every group size, single
# rows and columns, wide and tall.
ARRAYS = [
    (1, 1, 4),
    (3, 2, 4),
    (2, 6, 4),
    (4, 4, 8),
    (6, 3, 8),
    (1, 5, 8),
    (5, 1, 16),
    (2, 3, 16),
]


def unpack(words, group_size):
    """Wire slots [..., k] as weights [..., g], written from the documented layout alone."""
    words = np.asarray(words, np.int64)
    bits = slot_format(group_size, 2).index_bits
    index, exponent = words & ((1 << bits) - 1), (words >> bits) & 7
    sign, valid = (words >> (bits + 3)) & 1, words >> (bits + 4)
    values = valid * (1 - 2 * sign) << exponent
    return np.sum(values[..., None] * (index[..., None] == np.arange(group_size)), axis=-2)


def few_term_weights(rng, group_size, budget, *, limit=127):
    """Weights [8, 96] of at most ``budget`` terms a group; ragged pieces keep that property."""
    drawn = np.clip(np.round(rng.normal(scale=50, size=(8, 96))), -limit, limit)
    return np.array(
        project(drawn, group_size=group_size, budget=np.int32(budget), axis=1, limit=limit)
    )


def random_jobs(rng, rows, cols, group_size):
    """Jobs of random sizes, each budget from 1 to 12 once, half of them on several folds."""
    jobs = []
    for n, budget in enumerate(rng.permutation(np.arange(1, 13)).tolist()):
        most_k = min(96, 3 * rows * group_size) if n % 2 else rows * group_size
        filters = int(rng.integers(1, 9))
        reduction = int(rng.integers(1, most_k + 1))
        pixels = int(rng.integers(1, 3 * cols + 1 if n % 2 else cols + 1))
        weights = few_term_weights(rng, group_size, budget)[:filters, :reduction]
        activations = rng.integers(-128, 128, (pixels, reduction))
        jobs.append(rtl.Job(weights=weights, activations=activations, budget=budget))
    return jobs


def modelled(jobs, rows, cols, group_size, lanes=1):
    """The accelerator model's report, the jobs as dense layers of one network."""
    layers = [
        dense(f"job{n}", job.weights.shape[1], job.weights.shape[0], rows=job.activations.shape[0])
        for n, job in enumerate(jobs)
    ]
    pe = GroupPE(group_size=group_size, lanes=lanes)
    array = Array(rows=rows, cols=cols, dataflow="is", pe=pe)
    return evaluate(Network(layers), array, budgets=[job.budget for job in jobs])


@needs_icarus
@pytest.mark.parametrize("bits", [2, 3, 5, 8, 10])
def test_encoder_gives_the_naf_of_every_value(bits):
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int32)
    expected = np.asarray(encode(values, encoding="naf", bits=bits))
    assert not expected[:, bits:].any()  # two's complement values need no digit above
    np.testing.assert_array_equal(rtl.simulate_encoder(bits), expected[:, :bits])


@pytest.mark.parametrize("group_size", [2, 4, 8, 12, 16])
def test_packed_words_hold_the_weights_largest_term_first(group_size):
    groups = np.random.default_rng(group_size).integers(-170, 171, (50, group_size))
    words = rtl.wire_slots(groups, 4 * group_size)
    np.testing.assert_array_equal(unpack(words, group_size), groups)
    bits = slot_format(group_size, 2).index_bits
    valid, exponent = words >> (bits + 4), (words >> bits) & 7
    index = words & ((1 << bits) - 1)
    # Empty slots at the end only; exponents fall and, where equal, indices rise.
    assert np.all(valid[:, :-1] >= valid[:, 1:])
    rank = np.where(valid, (7 - exponent) * group_size + index, 8 * group_size).astype(np.int64)
    assert np.all((np.diff(rank, axis=1) > 0) | (valid[:, 1:] == 0))


def test_a_term_of_a_group_of_eight_is_a_byte():
    assert rtl.wire_slots(np.full((1, 8), 85), 32).max() < 256


@needs_icarus
@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_edge_streams_the_packed_words(group_size):
    """One word a cycle, groups back to back, whatever empty slots remain."""
    rng = np.random.default_rng(group_size)
    for budget in (3, 12):
        weights = few_term_weights(rng, group_size, budget)
        groups = weights.reshape(-1, group_size)
        np.testing.assert_array_equal(
            rtl.simulate_weight_edge(groups, slots=budget), rtl.wire_slots(groups, budget)
        )


@needs_icarus
@pytest.mark.parametrize("budget", [1, 4, 11])
def test_edge_cut_off_after_k_slots_is_greedy_projection(budget):
    """Largest first, so that truncating is term revealing (Kung et al., SC20)."""
    groups = np.random.default_rng(budget).integers(-128, 128, (64, 8))
    streamed = unpack(rtl.simulate_weight_edge(groups, slots=budget), 8)
    greedy = project(groups, group_size=8, budget=np.int32(budget), axis=1, method="greedy")
    np.testing.assert_array_equal(streamed, greedy)


@needs_icarus
@pytest.mark.parametrize("encode_at_edge", [False, True], ids=["terms", "weights"])
@pytest.mark.parametrize(("rows", "cols", "group_size"), ARRAYS)
def test_values_and_cycles_are_exact(rows, cols, group_size, encode_at_edge):
    rng = np.random.default_rng([rows, cols, group_size])
    jobs = random_jobs(rng, rows, cols, group_size)
    results = rtl.simulate_array(
        jobs, rows=rows, cols=cols, group_size=group_size, encode_at_edge=encode_at_edge
    )
    for job, result in zip(jobs, results, strict=True):
        product = job.activations.astype(np.int64) @ job.weights.astype(np.int64).T
        np.testing.assert_array_equal(result.outputs, product)
    report = modelled(jobs, rows, cols, group_size)
    np.testing.assert_array_equal([result.cycles for result in results], report.cycles)


def budgets_by_filter(jobs, rng, group_size):
    """The same jobs with slots of its own for every filter, all of them different."""
    varied = []
    for job in jobs:
        budgets = rng.permutation(np.arange(1, 13))[: len(job.weights)]
        columns = job.weights.shape[1]
        drawn = np.clip(np.round(rng.normal(scale=50, size=(len(budgets), columns))), -127, 127)
        weights = project(drawn, group_size=group_size, budget=budgets[:, None], axis=1, limit=127)
        weights = np.array(weights)
        varied.append(rtl.Job(weights=weights, activations=job.activations, budget=budgets))
    return varied


@needs_icarus
@pytest.mark.parametrize("encode_at_edge", [False, True], ids=["terms", "weights"])
@pytest.mark.parametrize(("rows", "cols", "group_size"), [(1, 1, 4), (3, 2, 4), (4, 4, 8)])
def test_values_and_cycles_are_exact_with_slots_of_its_own_for_every_filter(
    rows, cols, group_size, encode_at_edge
):
    rng = np.random.default_rng([rows, cols, group_size])
    jobs = budgets_by_filter(random_jobs(rng, rows, cols, group_size), rng, group_size)
    results = rtl.simulate_array(
        jobs, rows=rows, cols=cols, group_size=group_size, encode_at_edge=encode_at_edge
    )
    for job, result in zip(jobs, results, strict=True):
        product = job.activations.astype(np.int64) @ job.weights.astype(np.int64).T
        np.testing.assert_array_equal(result.outputs, product)
        row_folds = -(-job.weights.shape[1] // (rows * group_size))
        folds = row_folds * -(-len(job.activations) // cols)
        assert result.cycles == folds * (2 * rows + cols - 2 + job.budget.sum())
        assert result.slots == folds * rows * job.budget.sum()
    report = modelled(jobs, rows, cols, group_size)
    np.testing.assert_array_equal([result.cycles for result in results], report.cycles)
    reads = [result.psum_reads for result in results]
    np.testing.assert_array_equal(reads, report.accesses["sram_psum_read"])


@needs_icarus
@pytest.mark.parametrize("encode_at_edge", [False, True], ids=["terms", "weights"])
@pytest.mark.parametrize(
    ("rows", "cols", "group_size", "lanes"),
    [(1, 1, 4, 2), (3, 2, 4, 8), (4, 4, 8, 4), (2, 3, 16, 3)],
)
def test_values_and_cycles_are_exact_with_several_lanes(
    rows, cols, group_size, lanes, encode_at_edge
):
    """Jobs of one budget and jobs of one a filter, activations of both signs and of one."""
    rng = np.random.default_rng([rows, cols, group_size])
    jobs = random_jobs(rng, rows, cols, group_size)
    jobs[::3] = budgets_by_filter(jobs[::3], rng, group_size)
    jobs[::2] = [
        dataclasses.replace(j, activations=np.maximum(j.activations, 0)) for j in jobs[::2]
    ]
    results = rtl.simulate_array(
        jobs,
        rows=rows,
        cols=cols,
        group_size=group_size,
        lanes=lanes,
        encode_at_edge=encode_at_edge,
    )
    for job, result in zip(jobs, results, strict=True):
        product = job.activations.astype(np.int64) @ job.weights.astype(np.int64).T
        np.testing.assert_array_equal(result.outputs, product)
        row_folds = -(-job.weights.shape[1] // (rows * group_size))
        folds = row_folds * -(-len(job.activations) // cols)
        passes = -(-job.filter_budgets // lanes)
        assert result.cycles == folds * (2 * rows + cols - 2 + passes.sum())
        assert result.slots == folds * rows * lanes * passes.sum()
    report = modelled(jobs, rows, cols, group_size, lanes)
    np.testing.assert_array_equal([result.cycles for result in results], report.cycles)
    reads, writes = report.accesses["sram_psum_read"], report.accesses["sram_ofmap_write"]
    np.testing.assert_array_equal([result.psum_reads for result in results], reads)
    np.testing.assert_array_equal([result.psum_writes for result in results], writes)


@needs_icarus
@pytest.mark.parametrize("lanes", [2, 4])
def test_largest_sums_do_not_overflow_elements_of_several_lanes(lanes):
    weights = np.array([[170], [-170]]) * np.ones((1, 16), np.int64)
    activations = np.array([[-128], [127]]) * np.ones((1, 16), np.int64)
    job = rtl.Job(weights=weights, activations=activations, budget=32)
    (result,) = rtl.simulate_array([job], rows=2, cols=2, group_size=8, lanes=lanes)
    np.testing.assert_array_equal(result.outputs, activations @ weights.T)


@needs_icarus
def test_cycles_of_a_fold_follow_the_closed_form():
    """2R + C + T·k − 2 a fold, written out here for a job of 2 × 3 ragged folds."""
    rows, cols, group_size, filters, budget = 3, 2, 4, 5, 7
    job = rtl.Job(
        weights=np.zeros((filters, 2 * rows * group_size - 1), np.int64),
        activations=np.zeros((3 * cols - 1, 2 * rows * group_size - 1), np.int64),
        budget=budget,
    )
    (result,) = rtl.simulate_array([job], rows=rows, cols=cols, group_size=group_size)
    assert result.cycles == 2 * 3 * (2 * rows + cols + filters * budget - 2)
    assert result.slots == 2 * 3 * rows * filters * budget


@needs_icarus
def test_partial_sum_traffic_is_the_models():
    """Real pixels only; every row fold but the first reads what the one before it wrote."""
    rows, cols, group_size = 2, 3, 4
    jobs = random_jobs(np.random.default_rng(0), rows, cols, group_size)
    results = rtl.simulate_array(jobs, rows=rows, cols=cols, group_size=group_size)
    accesses = modelled(jobs, rows, cols, group_size).accesses
    reads, writes = accesses["sram_psum_read"], accesses["sram_ofmap_write"]
    assert np.any(reads > 0)
    np.testing.assert_array_equal([result.psum_reads for result in results], reads)
    np.testing.assert_array_equal([result.psum_writes for result in results], writes)


@needs_icarus
@pytest.mark.parametrize("group_size", [2, 4, 16])
def test_largest_sums_do_not_overflow_the_element(group_size):
    """170 = 2^7 + 2^5 + 2^3 + 2^1 is the largest sum of terms that the NAF allows in 8 digits."""
    weights = np.array([[170], [-170]]) * np.ones((1, 2 * group_size), np.int64)
    activations = np.array([[-128], [127]]) * np.ones((1, 2 * group_size), np.int64)
    job = rtl.Job(weights=weights, activations=activations, budget=4 * group_size)
    (result,) = rtl.simulate_array([job], rows=2, cols=2, group_size=group_size)
    np.testing.assert_array_equal(result.outputs, activations @ weights.T)


@needs_icarus
def test_zero_weights_take_their_slots_and_a_projected_128_is_a_term():
    activations = np.array([[-128, 127, 5]])
    zero = rtl.Job(weights=np.zeros((2, 3), np.int64), activations=activations, budget=3)
    power = rtl.Job(weights=np.array([[128, -128, 0]]), activations=activations, budget=2)
    nothing, product = rtl.simulate_array([zero, power], rows=1, cols=2, group_size=4)
    assert nothing.outputs.tolist() == [[0, 0]]
    assert nothing.cycles == 2 * 1 + 2 + 2 * 3 - 2
    assert product.outputs.tolist() == [[128 * (-128 - 127)]]


def test_jobs_that_make_no_sense_are_refused():
    ones = np.ones((2, 3), np.int64)
    with pytest.raises(ValueError, match="share K"):
        rtl.Job(weights=ones, activations=np.ones((2, 4), np.int64), budget=1)
    with pytest.raises(ValueError, match="non-empty"):
        rtl.Job(weights=np.ones((0, 3), np.int64), activations=ones, budget=1)
    with pytest.raises(ValueError, match="activations must fit int8"):
        rtl.Job(weights=ones, activations=128 * ones, budget=1)
    with pytest.raises(ValueError, match="weights must be integers"):
        rtl.Job(weights=0.5 * ones, activations=ones, budget=1)
    with pytest.raises(ValueError, match="at least one slot"):
        rtl.Job(weights=ones, activations=ones, budget=0)
    with pytest.raises(ValueError, match="at least one slot"):
        rtl.Job(weights=ones, activations=ones, budget=np.array([3, 0]))
    with pytest.raises(ValueError, match="one for each of 2 filters"):
        rtl.Job(weights=ones, activations=ones, budget=np.array([3, 1, 2]))


def test_images_refuse_what_the_array_could_not_compute(tmp_path):
    activations = np.ones((1, 4), np.int64)
    seven = rtl.Job(weights=np.full((1, 4), 7), activations=activations, budget=7)
    large = rtl.Job(weights=np.array([[128, 0, 0, 0]]), activations=activations, budget=1)
    array = {"rows": 1, "cols": 1, "group_size": 4}
    with pytest.raises(ValueError, match="8 terms but only 7 slots"):
        rtl.write_images(tmp_path, [seven], **array, encode_at_edge=False)
    with pytest.raises(ValueError, match="stored weights must fit int8"):
        rtl.write_images(tmp_path, [large], **array, encode_at_edge=True)
    with pytest.raises(ValueError, match="term 2"):
        rtl.wire_slots(np.array([171, 0]), 8)
    with pytest.raises(ValueError, match="group_size at least 2"):
        rtl.simulate_array([large], rows=1, cols=1, group_size=1)


def test_missing_simulator_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not rtl.icarus_available()
    with pytest.raises(FileNotFoundError, match="apt-get install iverilog"):
        rtl.simulate_encoder(8)


@needs_icarus
def test_a_waveform_shows_every_element_in_every_cycle(tmp_path):
    job = rtl.Job(weights=np.array([[3, 0, -4, 1]]), activations=np.array([[5, 6, 7, 8]]), budget=4)
    sizes = {"rows": 1, "cols": 1, "group_size": 4}
    (result,) = rtl.simulate_array([job], **sizes, waveform=tmp_path / "waves.vcd")
    assert result.outputs == rtl.simulate_array([job], **sizes)[0].outputs == -5
    waves = (tmp_path / "waves.vcd").read_text()
    sum_register = re.search(r"\$scope module element \$end.*?(\S+) sum \[", waves, re.DOTALL)[1]
    # 3 x 5 - 4 x 7 + 8, largest exponents first: 4 x 5, -4 x 7, -1 x 5, 1 x 8.
    shown = [int(v, 2) for v in re.findall(rf"^b([01]+) {re.escape(sum_register)}$", waves, re.M)]
    assert shown[:4] == [0, 20, 2**18 - 8, 2**18 - 13]

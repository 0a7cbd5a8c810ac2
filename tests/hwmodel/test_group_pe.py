import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SMALL, random_weights, resnet18

from stp_jax import hwmodel, terms


def test_group_pe_folds_groups_and_takes_k_cycles_a_step():
    network = resnet18()
    pe = hwmodel.GroupPE(group_size=8)
    report = hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=16, pe=pe), budgets=6)
    K, P, M = (network.extents(name) for name in "KPM")
    folds = np.ceil(K / (32 * 8)) * np.ceil(P / 16)
    np.testing.assert_array_equal(report.cycles, folds * (2 * 32 + 16 + M * 6 - 2))


def test_group_pe_of_one_activation_and_one_term_is_the_bit_parallel_array():
    base = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12))
    pe = hwmodel.GroupPE(group_size=1)
    ours = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12, pe=pe), budgets=1)
    np.testing.assert_array_equal(ours.cycles, base.cycles)
    for name, count in base.accesses.items():
        np.testing.assert_array_equal(ours.accesses[name], count)
    # A term of 0.124 pJ for a multiply-accumulate of 0.30 pJ.
    assert hwmodel.computational_saving(base, ours) == pytest.approx(0.3 / 0.124)


def test_grouping_by_channels_starts_anew_at_each_kernel_position():
    def cycles(grouping, layer):
        pe = hwmodel.GroupPE(group_size=8, grouping=grouping)
        array = hwmodel.Array(rows=1, cols=1, pe=pe)
        return int(hwmodel.evaluate(hwmodel.Network((layer,)), array, budgets=1).total_cycles)

    def conv(channels, groups=1):
        kwargs = {"filters": 16, "kernel": (3, 3), "padding": "VALID", "groups": groups}
        return hwmodel.conv("c", (3, 3), channels=channels, **kwargs)

    fill = 2 + 1 - 2
    assert cycles("flat", conv(12)) == 14 * (fill + 16)  # ceil(108 / 8)
    assert cycles("channels", conv(12)) == 9 * 2 * (fill + 16)
    assert cycles("flat", conv(16)) == cycles("channels", conv(16))
    assert cycles("flat", conv(16, 16)) == cycles("channels", conv(16, 16)) == 16 * 2 * (fill + 1)


def test_array_energy_is_that_of_the_weights_real_terms():
    weights = random_weights(SMALL)
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=4))
    report = hwmodel.evaluate(SMALL, array, weights=weights)
    counts = np.array([int(terms.count(w.astype(np.int32)).sum()) for w in weights.values()])
    np.testing.assert_array_equal(report.operations["terms"], counts * SMALL.extents("P"))
    np.testing.assert_allclose(
        report.energy_pj["array"], counts * SMALL.extents("P") * (0.024 + 0.1)
    )


def test_unbudgeted_layers_run_at_what_their_groups_need():
    weights = random_weights(SMALL)
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=8))
    report = hwmodel.evaluate(
        SMALL, array, budgets={"b": 32, "c": None}, weights={"a": weights["a"]}
    )
    counted = np.asarray(terms.count(weights["a"].astype(np.int32))).reshape(45, 20)
    largest = np.pad(counted, ((0, 3), (0, 0))).reshape(6, 8, 20).sum(axis=1).max()
    assert report.budgets.tolist() == [largest, 32, 32, 32]  # 8 weights of at most 4 NAF digits


def test_empty_slots_cost_their_cycle_only():
    weights = {name: np.zeros_like(w) for name, w in random_weights(SMALL).items()}
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE())
    full = hwmodel.evaluate(SMALL, array, budgets=8)
    empty = hwmodel.evaluate(SMALL, array, budgets=8, weights=weights)
    np.testing.assert_array_equal(full.cycles, empty.cycles)
    assert empty.energy_pj["array"].sum() == 0


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (-1, "from 0 to 32"),
        (33, "from 0 to 32"),
        (2.5, "whole number"),
        ([8, 8], "2 budgets for 4 layers"),
        (np.ones(3), r"shape \(3,\)"),
        ({"nowhere": 8}, "nowhere"),
        ({"a": 3}, "a group of its weights holds"),
    ],
)
def test_impossible_budgets_are_refused(budgets, message):
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=8))
    with pytest.raises(ValueError, match=message):
        hwmodel.evaluate(SMALL, array, budgets=budgets, weights=random_weights(SMALL))


def test_selection_of_activations_is_an_estimate_of_its_own():
    """56 two-input multiplexers of 8:1 by 8 bits, of which 36 are a shift of 0.024 pJ."""
    network = hwmodel.Network((hwmodel.dense("fc", 64, 10),))
    base = hwmodel.evaluate(network, hwmodel.Array(rows=8, cols=8))
    pe = hwmodel.GroupPE(group_size=8)
    ours = hwmodel.evaluate(network, hwmodel.Array(rows=8, cols=8, pe=pe), budgets=8)
    assert base.select_pj.tolist() == [0]
    selected = 0.024 * 56 / 36
    np.testing.assert_allclose(ours.select_pj, ours.operations["terms"] * selected)
    assert "select" not in ours.energy_pj
    assert hwmodel.computational_saving(base, ours) == pytest.approx(0.3 / 0.124)
    saving = hwmodel.computational_saving(base, ours, select=True)
    assert saving == pytest.approx(0.3 / (0.124 + selected))


def test_packed_terms_are_smaller_than_bytes_at_few_terms():
    def dram(packed, k):
        pe = hwmodel.GroupPE(group_size=8, packed=packed)
        report = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12, pe=pe), budgets=k)
        return report.dram_bytes.sum()

    assert dram(True, 4) < dram(False, 4) < dram(True, 16)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("group_size", [1, 6, 8, 16])
def test_packed_weights_take_the_memory_of_their_stream(group_size, bits):
    """DRAM reads what `terms.pack` writes, budget by budget, a single slot's marker included."""
    network = hwmodel.Network((hwmodel.dense("fc", 4 * group_size, 3),))

    def dram_bits(k, **options):
        pe = hwmodel.GroupPE(group_size=group_size, bits=bits, **options)
        report = hwmodel.evaluate(network, hwmodel.Array(rows=2, cols=2, pe=pe), budgets=k)
        return 8 * report.dram_bytes[0]

    zeros = np.zeros((4 * group_size, 3), int)
    for k in (1, 2, 3):
        stream = terms.pack(zeros, group_size=group_size, budget=k, axis=0, bits=bits)
        moved = dram_bits(k, packed=True) - dram_bits(k)
        assert moved == pytest.approx((stream.bits_per_weight - bits) * zeros.size)


def test_a_slot_travels_with_a_valid_bit():
    form = hwmodel.GroupPE(group_size=8).slot_format(8)
    # Valid, sign, exponents 0 to 7, index 0 to 7: at k = g as many bits as int8.
    assert (form.stored_bits, form.wire_bits) == (7, 8)


DENSE = hwmodel.dense("d", 12, 6)
PRODUCT = hwmodel.matmul("m", 5, 4, 3, products=2)


def random(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape)


DEPTHWISE = hwmodel.conv("dw", (8, 8), channels=16, filters=16, kernel=(3, 3), groups=16)


@pytest.mark.parametrize("grouping", ["flat", "channels"])
def test_ragged_groups_hold_no_more_than_their_weights_can(grouping):
    """K = 9, g = 8: a whole group, and one weight that has at most 4 digits."""
    network = hwmodel.Network((DEPTHWISE,))
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8, grouping=grouping))
    report = hwmodel.evaluate(network, array)
    assert report.budgets.tolist() == [32]
    assert report.terms_per_mac == 4
    most = hwmodel.evaluate(network, array, weights={"dw": np.full((9, 16), 85)})  # 64+16+4+1
    np.testing.assert_array_equal(report.cycles, most.cycles)
    np.testing.assert_array_equal(report.operations["terms"], most.operations["terms"])
    eight = hwmodel.evaluate(network, array, budgets=8)
    assert eight.terms_per_mac == pytest.approx((8 + 4) / 9)
    traced = jax.jit(lambda k: hwmodel.evaluate(network, array, budgets=k))(jnp.float32(8))
    np.testing.assert_array_equal(traced.operations["terms"], eight.operations["terms"])


def test_the_default_budget_is_what_a_short_reduction_needs():
    layers = (
        hwmodel.dense("short", 3, 5),
        hwmodel.conv("rgb", (8, 8), channels=3, filters=5, kernel=(3, 3)),
    )
    network = hwmodel.Network(layers)

    def budgets(grouping):
        pe = hwmodel.GroupPE(group_size=8, grouping=grouping)
        return hwmodel.evaluate(network, hwmodel.Array(rows=4, cols=4, pe=pe)).budgets.tolist()

    assert budgets("flat") == [12, 32]
    assert budgets("channels") == [12, 12]


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_array_energy_of_whole_groups_is_linear_in_the_budget(smoothing):
    network = hwmodel.Network((hwmodel.dense("d", 64, 5),))
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8))
    energies = [
        hwmodel.evaluate(network, array, budgets=k, smoothing=smoothing).energy_pj["array"][0]
        for k in (1, 2, 16, 32)
    ]
    np.testing.assert_allclose(energies, energies[0] * np.array([1, 2, 16, 32]))


@pytest.mark.parametrize("known", [False, True])
def test_operands_computed_at_run_time_are_not_packed(known):
    network = hwmodel.Network((PRODUCT, DENSE))
    weights = {"m": random(2, 4, 3)} if known else None

    def report(packed):
        pe = hwmodel.GroupPE(group_size=4, packed=packed)
        array = hwmodel.Array(rows=4, cols=4, pe=pe)
        return hwmodel.evaluate(network, array, budgets=16, weights=weights)

    plain, packed = report(False), report(True)
    same = packed.dram_bytes == plain.dram_bytes
    assert same.tolist() == [not known, False]
    expected = plain.energy_pj["encoder"] * [not known, False]
    np.testing.assert_allclose(packed.energy_pj["encoder"], expected)


LAYER = hwmodel.conv("c", (5, 6), channels=6, filters=10, kernel=(3, 3), groups=2)
NETWORK = hwmodel.Network((LAYER, hwmodel.dense("d", 11, 7, rows=3)))


def test_term_macs_take_k_times_s_cycles():
    single = hwmodel.GroupPE(group_size=4)
    pairs = hwmodel.TermMac(group_size=4, data_terms=3)
    one, three = (
        hwmodel.evaluate(NETWORK, hwmodel.Array(rows=3, cols=4, pe=pe), budgets=5)
        for pe in (single, pairs)
    )
    fill = hwmodel.arrays.fold(NETWORK, hwmodel.Array(rows=3, cols=4, pe=single)).fill_cycles
    np.testing.assert_array_equal(three.cycles - fill, 3 * (one.cycles - fill))
    np.testing.assert_array_equal(three.operations["terms"], 3 * one.operations["terms"])


def test_bad_group_pes_are_refused():
    with pytest.raises(ValueError, match="group_size"):
        hwmodel.GroupPE(group_size=0)
    with pytest.raises(ValueError, match="encoding"):
        hwmodel.GroupPE(encoding="octal")

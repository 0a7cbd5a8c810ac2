import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet18 import resnet18

from stp_jax import hwmodel, terms

SMALL = hwmodel.Network(
    (
        hwmodel.conv("a", (11, 11), channels=5, filters=20, kernel=(3, 3), padding="VALID"),
        hwmodel.conv("b", (15, 15), channels=40, filters=24, kernel=(1, 1), stride=(2, 2)),
        hwmodel.conv("c", (7, 7), channels=64, filters=24, kernel=(1, 1)),
        hwmodel.dense("d", 70, 33),
    )
)
# What SCALE-Sim 3.0.0 prints for SMALL on 8 x 12 with 3 x 2 kB of SRAM: total cycles plus the one
# that it leaves out, SRAM reads of inputs and filters, SRAM writes, DRAM reads of filters.
SCALESIM = {
    "is": (
        (1932, 1500, 2000, 531),
        (3645, 2560, 3136, 70),
        (6300, 5760, 7680, 2310),
        (9720, 7680, 9408, 297),
        (900, 960, 7680, 2310),
    ),
    "ws": (
        (1284, 900, 1200, 729),
        (7290, 5120, 6272, 210),
        (900, 960, 1536, 2310),
        (9720, 7680, 9408, 297),
        (900, 960, 1536, 2310),
    ),
    # Its SRAM writes include bubbles here; the DRAM writes have the outputs. Its 1768 filter reads
    # of layer c are 1536 and a refetch at the seam of two folds.
    "os": (
        (1386, 928, 1148, 264),
        (7290, 5120, 6272, 210),
        (9900, 7680, 10752, 2310),
        (1620, 1536, 1176, 33),
        (900, 960, 1536, 2310),
    ),
}


@pytest.mark.parametrize("dataflow", SCALESIM)
def test_counts_are_scalesims(dataflow):
    sizes = dict.fromkeys(("ifmap_sram", "filter_sram", "ofmap_sram"), 2 << 10)
    report = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12, dataflow=dataflow, **sizes))
    names = ("sram_ifmap_read", "sram_filter_read", "sram_ofmap_write", "dram_filter_read")
    ours = (report.cycles, *(report.accesses[name] for name in names))
    np.testing.assert_array_equal(ours, SCALESIM[dataflow])


def test_resnet18_has_its_published_size_and_closed_form_cycles():
    network = resnet18()
    assert len(network) == 21
    assert round(network.macs / 1e9, 3) == 1.814
    report = hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=32))
    K, P, M = (network.extents(name) for name in "KPM")
    folds = np.ceil(K / 32) * np.ceil(P / 32)
    np.testing.assert_array_equal(report.cycles, folds * (2 * 32 + 32 + M - 2))
    np.testing.assert_allclose(report.utilization, K * P * M / (1024 * report.cycles))


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


def random_weights(network, scale=20.0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        layer.name: np.clip(np.rint(rng.normal(0, scale, (layer.K, layer.filters))), -127, 127)
        .astype(np.int8)
        .reshape(*layer.kernel, -1, layer.filters)
        for layer in network
    }


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


def test_bad_arrays_and_weights_are_refused():
    for rows, cols in ((0, 4), (4, 2.5), (-1, 4), (np.inf, 4), (4, np.nan), (4, 2**53), (2**70, 4)):
        sizes = {"rows": rows, "cols": cols}
        with pytest.raises(ValueError, match="positive integer"):
            hwmodel.Array(**sizes)
    with pytest.raises(ValueError, match="dataflow"):
        hwmodel.Array(rows=4, cols=4, dataflow="rs")
    with pytest.raises(ValueError, match="group_size"):
        hwmodel.GroupPE(group_size=0)
    with pytest.raises(ValueError, match="encoding"):
        hwmodel.GroupPE(encoding="octal")
    with pytest.raises(ValueError, match="no budgets"):
        hwmodel.evaluate(SMALL, hwmodel.Array(rows=4, cols=4), budgets=4)
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE())
    with pytest.raises(ValueError, match="do not hold"):
        hwmodel.evaluate(SMALL, array, weights={"a": np.zeros((3, 3, 5, 21), np.int8)})
    with pytest.raises(TypeError, match="integers"):
        hwmodel.evaluate(SMALL, array, weights={"d": np.zeros((70, 33))})
    with pytest.raises(ValueError, match="exceeds 8 bits"):
        hwmodel.evaluate(SMALL, array, weights={"d": np.full((70, 33), 200)})


def test_jit_and_vmap_agree_with_the_exact_evaluation():
    pe = hwmodel.GroupPE(group_size=8)
    weights = hwmodel.measure_terms(SMALL, random_weights(SMALL, scale=3.0), pe)
    rows, sizes = np.array([4, 8, 16]), np.array([512, 4096, 65536])
    budgets = np.arange(12).reshape(3, 4) + 21

    def design(rows, filter_sram, budgets):
        array = hwmodel.Array(
            rows=rows, cols=12, filter_sram=filter_sram, pe=hwmodel.GroupPE(group_size=8)
        )
        return hwmodel.evaluate(SMALL, array, budgets=budgets, weights=weights)

    swept = jax.jit(jax.vmap(design))(jnp.asarray(rows), jnp.asarray(sizes), jnp.asarray(budgets))
    for i in range(3):
        exact = design(int(rows[i]), int(sizes[i]), budgets[i])
        assert exact.cycles.dtype == np.int64
        np.testing.assert_array_equal(swept.cycles[i], exact.cycles)
        for name, energy in exact.energy_pj.items():
            np.testing.assert_allclose(swept.energy_pj[name][i], energy, rtol=1e-5)


def test_finite_bandwidth_stalls_what_double_buffering_cannot_hide():
    free = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12))
    slow = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12, dram_bandwidth=0.01))
    fast = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12, dram_bandwidth=1e9))
    assert (free.stall_cycles == 0).all()
    assert (slow.cycles >= slow.dram_bytes / 0.01).all()
    np.testing.assert_allclose(slow.compute_cycles, free.cycles)
    np.testing.assert_allclose(fast.cycles, free.cycles, rtol=1e-4)


@pytest.mark.parametrize("bandwidth", [1.0, 0.5])
def test_one_fold_takes_its_fill_its_computation_and_no_byte_twice(bandwidth):
    """512 inputs and 512000 weights come first; 1000 outputs leave while 2536 cycles compute."""
    network = hwmodel.Network((hwmodel.dense("fc", 512, 1000),))
    array = hwmodel.Array(rows=512, cols=514, dram_bandwidth=bandwidth, filter_sram=2 << 20)
    report = hwmodel.evaluate(network, array)
    assert report.dram_bytes.tolist() == [513_512]
    compute = 2 * 512 + 514 + 1000 - 2
    assert report.cycles.tolist() == [512_512 / bandwidth + compute]
    slow = hwmodel.Array(rows=512, cols=514, dram_bandwidth=0.25, filter_sram=2 << 20)
    assert hwmodel.evaluate(network, slow).cycles.tolist() == [513_512 / 0.25]


@pytest.mark.parametrize("lanes", [1, 8])
def test_loading_clocks_every_row_in_every_cycle_of_the_load(lanes):
    """As the Verilog does: `load` is high for R cycles, in which all R rows shift."""
    network = hwmodel.Network((hwmodel.dense("fc", 40, 3, rows=7),))
    pe = hwmodel.BitParallel() if lanes == 1 else hwmodel.GroupPE(group_size=8)
    budgets = None if lanes == 1 else 4

    def bits(rows, dataflow="is"):
        array = hwmodel.Array(rows=rows, cols=5, pe=pe, dataflow=dataflow)
        report = hwmodel.evaluate(network, array, budgets=budgets)
        return report.energy_pj["registers"][0] / hwmodel.HOROWITZ_45NM.energy_pj["register_bit"]

    def loads(rows, col_folds):
        return -(-40 // (rows * lanes)) * col_folds * rows * rows * 5

    # 7 pixels take two folds of 5 columns, 3 filters one; k = 4 slots of 8 bits for 8 weights.
    weights = 8 if lanes == 1 else 4 * 8
    for dataflow, col_folds, resident in (("is", 2, 8 * lanes), ("ws", 1, weights)):
        grown = bits(4, dataflow) - bits(2, dataflow)
        assert grown == pytest.approx((loads(4, col_folds) - loads(2, col_folds)) * resident)


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


def test_energies_need_a_table_of_one_node(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(
        'name = "x"\nnode_nm = 28\n[energy_pj]\n'
        'int32_add = {value = 0.05, source = "s"}\nint8_multiply = {value = 0.1, source = "s"}\n'
    )
    table = hwmodel.read_technology(path)
    with pytest.raises(ValueError, match="dram_64b, register_bit"):
        hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12), technology=table)
    path.write_text(path.read_text().replace("add = {", "add = {node_nm = 45, "))
    with pytest.raises(ValueError, match="45 nm in a 28 nm table"):
        hwmodel.read_technology(path)


def test_sram_energy_interpolates_horowitz():
    capacities = np.array([8, 32, 1024]) * 1024.0
    energy = hwmodel.HOROWITZ_45NM.sram_pj_per_byte(capacities)
    np.testing.assert_allclose(8 * energy, [10, 20, 100])
    between = 8 * hwmodel.HOROWITZ_45NM.sram_pj_per_byte(np.float64(256 << 10))
    assert 20 < between < 100


def test_report_exports_every_layer_and_the_total():
    report = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12))
    frame = report.to_pandas()
    assert list(frame.index) == list(SMALL.names)
    assert frame["cycles"].sum() == report.total_cycles
    energies = frame[[c for c in frame if c.endswith("_pj")]].to_numpy().sum()
    assert energies == pytest.approx(report.total_energy_pj)
    assert report.table().splitlines()[-1].startswith("total")


def test_savings_compare_one_network_only():
    array = hwmodel.Array(rows=8, cols=12)
    other = hwmodel.Network(SMALL.layers[:2])
    with pytest.raises(ValueError, match="different networks"):
        hwmodel.computational_saving(hwmodel.evaluate(SMALL, array), hwmodel.evaluate(other, array))


def test_savings_compare_one_node_only():
    array = hwmodel.Array(rows=8, cols=12)
    other = dataclasses.replace(hwmodel.HOROWITZ_45NM, node_nm=28.0)
    reports = [
        hwmodel.evaluate(SMALL, array, technology=table) for table in (hwmodel.HOROWITZ_45NM, other)
    ]
    assert [report.node_nm for report in reports] == [45, 28]
    with pytest.raises(ValueError, match="at 45 nm and 28 nm"):
        hwmodel.computational_saving(*reports)


def test_counts_that_float64_does_not_hold_exactly_stay_real():
    network = hwmodel.Network((hwmodel.dense("fc", 2**18, 2**18, rows=2**18),))
    report = hwmodel.evaluate(network, hwmodel.Array(rows=8, cols=12))
    assert report.operations["macs"].dtype == np.float64  # 2**54
    assert report.accesses["sram_ifmap_read"].dtype == np.int64

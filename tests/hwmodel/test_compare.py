import dataclasses

import numpy as np
import pytest
from networks import resnet18

from stp_jax import hwmodel

NETWORK = resnet18()
INT8 = hwmodel.Array(rows=32, cols=32)


STP = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


def test_one_term_per_weight_saves_what_the_table_says():
    frame = hwmodel.compare(NETWORK, {"int8": INT8, "stp": hwmodel.Design(array=STP, budgets=8)})
    # Layers whose last group is ragged have the budget of whole ones: conv1, 147 = 18 * 8 + 3.
    slots = np.ceil(NETWORK.extents("K") / 8) * 8 * NETWORK.extents("P") * NETWORK.extents("M")
    expected = 0.3 * NETWORK.macs / (0.124 * slots.sum())
    assert frame.loc["stp", "array_saving"] == pytest.approx(expected)
    assert frame.loc["stp", "array_saving_with_encoder"] < frame.loc["stp", "array_saving"]
    assert frame.loc["int8", ["speedup", "array_saving", "total_saving"]].tolist() == [1, 1, 1]


def test_the_peak_counts_the_cycles_of_every_group():
    layers = [hwmodel.dense(name, 64, 16, rows=5) for name in ("a", "b")]
    network = hwmodel.Network(tuple(layers))
    pe = hwmodel.GroupPE(group_size=8, lanes=4)

    def macs_a_cycle(**budgets):
        design = hwmodel.Design(array=hwmodel.Array(rows=4, cols=4, pe=pe), budgets=budgets)
        return hwmodel.peak_macs(design, network) / 16

    assert macs_a_cycle(a=4, b=5) == pytest.approx(8 / 1.5)  # one and two cycles
    assert macs_a_cycle(a=0, b=5) == pytest.approx(8 / 1.5)  # a group without terms takes one
    by_filter = np.repeat([1, 8], 8)
    assert macs_a_cycle(a=by_filter, b=by_filter) == pytest.approx(8 / 1.5)


def test_matched_arrays_have_the_baselines_area_or_throughput():
    designs = {
        "int8": hwmodel.Design(array=INT8),
        "stp": hwmodel.Design(array=STP, budgets=16),
        "stripes": hwmodel.Design(array=hwmodel.Array(rows=32, cols=32, pe=hwmodel.Stripes())),
    }
    area = hwmodel.compare(NETWORK, designs, by="area")
    column = area["area_mm2"] / area["cols"]
    assert (area["area_mm2"] <= area.loc["int8", "area_mm2"]).all()
    assert (area["area_mm2"] + column > area.loc["int8", "area_mm2"]).all()
    matched = [
        hwmodel.match(design, designs["int8"], NETWORK, by="throughput")
        for design in designs.values()
    ]
    assert [design.array.cols for design in matched] == [32, 64, 16]
    assert {hwmodel.peak_macs(design, NETWORK) for design in matched} == {1024.0}
    with pytest.raises(ValueError, match="'area' or 'throughput'"):
        hwmodel.compare(NETWORK, designs, by="price")


def test_nothing_to_compare_is_said():
    with pytest.raises(ValueError, match="at least a baseline"):
        hwmodel.compare(NETWORK, {})


def test_a_list_of_designs_is_refused():
    with pytest.raises(TypeError, match="must be a mapping from names to arrays"):
        hwmodel.compare(NETWORK, [INT8, STP])


def test_tables_without_areas_compare_all_but_area():
    table = dataclasses.replace(hwmodel.HOROWITZ_45NM, area_um2={})
    frame = hwmodel.compare(NETWORK, {"int8": INT8, "stp": STP}, technology=table)
    assert frame["area_mm2"].isna().all()
    assert frame.loc["stp", "array_saving"] > 0
    with pytest.raises(ValueError, match="has no area_um2 entry"):
        hwmodel.compare(NETWORK, {"int8": INT8, "stp": STP}, by="area", technology=table)


def test_what_cannot_be_matched_is_refused():
    small = hwmodel.Design(array=hwmodel.Array(rows=2, cols=1))
    with pytest.raises(ValueError, match=r"a single column of 32 GroupPE takes .* more than"):
        hwmodel.match(hwmodel.Design(array=STP), small, NETWORK, by="area")


@pytest.mark.parametrize("dataflow", ["is", "ws", "os"])
def test_matched_area_counts_the_encoders_of_every_dataflow(dataflow):
    array = dataclasses.replace(STP, dataflow=dataflow)
    base = hwmodel.Design(array=INT8)
    matched = hwmodel.match(hwmodel.Design(array=array), base, NETWORK, by="area").array
    wider = dataclasses.replace(matched, cols=matched.cols + 1)
    area, more, room = (sum(hwmodel.array_area_um2(a).values()) for a in (matched, wider, INT8))
    assert area <= room < more
    itself = hwmodel.match(
        hwmodel.Design(array=array), hwmodel.Design(array=array), NETWORK, by="area"
    )
    assert itself.array.cols == 32


def test_elasticities_are_the_entries_shares_of_array_energy():
    def saving(technology):
        reports = (
            hwmodel.evaluate(NETWORK, INT8, technology=technology),
            hwmodel.evaluate(NETWORK, STP, budgets=8, technology=technology),
        )
        return hwmodel.computational_saving(*reports)

    frame = hwmodel.sensitivity(saving)
    expected = dict.fromkeys(frame.index, 0.0)
    expected["int8_multiply"] = 0.2 / 0.3
    expected["int32_add"] = 0.1 / 0.3 - 0.1 / 0.124
    expected["int8_shift"] = -0.024 / 0.124
    for name, elasticity in expected.items():
        assert frame.loc[name, "elasticity"] == pytest.approx(elasticity, abs=1e-5)
    assert frame.loc["int8_multiply", "doubled"] == pytest.approx(
        saving(hwmodel.HOROWITZ_45NM) * 5 / 3
    )


def designs(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "rows": rng.integers(4, 65, count),
        "cols": rng.integers(4, 65, count),
        "group_size": rng.integers(4, 17, count),
        "budgets": rng.integers(1, 16, (count, len(NETWORK))),
        "filter_sram": 1 << rng.integers(12, 21, count),
        "dram_bandwidth": rng.uniform(1, 64, count),
    }


def test_the_int8_baseline_is_of_the_same_throughput_class():
    for pe, lanes in (
        (hwmodel.BitParallel(), 1),
        (hwmodel.BitWave(), 1),
        (hwmodel.Stripes(lanes=8, serial="weights"), 1),
        (hwmodel.TermMac(group_size=8), 1),
        (hwmodel.GroupPE(group_size=8), 1),
        (hwmodel.GroupPE(group_size=8, lanes=2), 1),
        (hwmodel.GroupPE(group_size=8, lanes=4), 8),
        (hwmodel.DotProduct(lanes=8), 8),
    ):
        assert hwmodel.int8_baseline(pe) == hwmodel.DotProduct(lanes=lanes), pe


def test_by_gates_all_are_set_against_the_strongest_int8_pes():
    network = hwmodel.Network((hwmodel.dense("fc", 64, 16, rows=5),))
    rng = np.random.default_rng(0)
    given = {
        "weights": {"fc": rng.integers(-127, 128, (64, 16))},
        "activations": {"fc": rng.integers(0, 128, (5, 64))},
    }
    designs = {
        "eight": hwmodel.Array(rows=4, cols=4, pe=hwmodel.DotProduct(lanes=8)),
        "bitwave": hwmodel.Design(
            array=hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitWave()), **given
        ),
        "lanes": hwmodel.Design(
            array=hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(lanes=4)), budgets=4
        ),
        "laconic": hwmodel.Design(
            array=hwmodel.Array(rows=4, cols=4, pe=hwmodel.Laconic()), **given
        ),
    }
    frame = hwmodel.compare_by_gates(network, designs)
    assert frame["class_lanes"].tolist() == [8, 1, 8, 1]
    assert frame.loc["eight", ["saving", "saving_over_dot_8"]].tolist() == [1, 1]
    assert frame.loc["bitwave", "saving"] > frame.loc["bitwave", "saving_over_dot_8"]
    assert np.isnan(frame.loc["bitwave", "saving_with_encoder"])
    assert frame.loc["lanes", "saving_with_encoder"] < frame.loc["lanes", "saving"]
    assert np.isnan(frame.loc["laconic", "pj_per_mac"])
    assert "no" in frame.loc["laconic", "reason"] and "Laconic" in frame.loc["laconic", "reason"]
    assert not frame.loc["lanes", "reason"]
    assert frame.loc["eight", "um2_per_mac"] == pytest.approx(3965 / 8)
    # Eight products in the one cycle that four terms take.
    assert frame.loc["lanes", "um2_per_mac"] == pytest.approx((1465 + 2453 / 4) / 8)
    assert np.isnan(frame.loc["laconic", "um2_per_mac"])
    with pytest.raises(ValueError, match="by the table, not by gates"):
        hwmodel.compare_by_gates(network, designs, technology=hwmodel.HOROWITZ_45NM)

"""Several arrays beside each other: folds dealt out, energies summed, DRAM read once for all."""

import dataclasses

import jax
import numpy as np
import pytest

from stp_jax import hwmodel

NETWORK = hwmodel.Network(
    (
        hwmodel.conv("conv", (14, 14), channels=64, filters=48, kernel=3),
        hwmodel.conv("depthwise", (14, 14), channels=32, filters=32, kernel=3, groups=32),
        hwmodel.dense("fc", 512, 1000),
    )
)
DATAFLOWS = ("is", "ws", "os")


def array(**fields):
    return hwmodel.Array(**{"rows": 16, "cols": 16} | fields)


def column_folds(dataflow):
    columns = {"is": "P", "ws": "M", "os": "M"}[dataflow]
    return NETWORK.extents("groups") * -(-NETWORK.extents(columns) // 16)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("count", [2, 3, 1000])
def test_each_layer_takes_the_rounds_in_which_its_column_folds_are_dealt_out(dataflow, count):
    one = hwmodel.evaluate(NETWORK, array(dataflow=dataflow))
    several = hwmodel.evaluate(NETWORK, array(dataflow=dataflow, count=count))
    folds = column_folds(dataflow)
    rounds = -(-folds // count)
    np.testing.assert_array_equal(several.cycles * folds, one.cycles * rounds)
    np.testing.assert_allclose(
        several.utilization * several.cycles * count, one.utilization * one.cycles
    )
    for component, energy in one.energy_pj.items():
        if component != "dram":
            np.testing.assert_array_equal(several.energy_pj[component], energy)


def test_group_pes_with_budgets_by_filter_scale_alike():
    budgets = {"conv": np.arange(1, 49) % 8 + 1}
    ours = array(pe=hwmodel.GroupPE(group_size=8))
    one = hwmodel.evaluate(NETWORK, ours, budgets=budgets)
    four = hwmodel.evaluate(NETWORK, dataclasses.replace(ours, count=4), budgets=budgets)
    assert four.cycles[0] * 13 == one.cycles[0] * 4  # 196 pixels in 13 column folds, 4 rounds


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_what_does_not_fit_is_read_again_once_a_round(dataflow):
    small = {"ifmap_sram": 64, "filter_sram": 64, "dataflow": dataflow}
    one, four = (hwmodel.evaluate(NETWORK, array(count=n, **small)) for n in (1, 4))
    assert (four.dram_bytes <= one.dram_bytes).all() and four.dram_bytes[0] < one.dram_bytes[0]
    most = hwmodel.evaluate(NETWORK, array(count=1000, **small))
    reads = "dram_filter_read" if dataflow == "is" else "dram_ifmap_read"
    fits = hwmodel.evaluate(NETWORK, array(dataflow=dataflow))
    np.testing.assert_array_equal(most.accesses[reads], fits.accesses[reads])


def test_dram_is_shared_and_sram_is_not():
    slow = {"dram_bandwidth": 1.0}
    one, many = (hwmodel.evaluate(NETWORK, array(count=n, **slow)) for n in (1, 1000))
    assert (many.cycles >= one.dram_bytes).all(), "no array has a DRAM of its own"
    narrow = {"sram_bandwidth": 0.5}
    one, two = (hwmodel.evaluate(NETWORK, array(count=n, **narrow)) for n in (1, 2))
    assert two.cycles[1] == pytest.approx(one.cycles[1] / 2, rel=0.01)


def test_counts_are_swept_and_traced_as_integers():
    found = hwmodel.sweep(NETWORK, {"count": [1, 2, 4]})
    exact = [hwmodel.evaluate(NETWORK, hwmodel.Array(rows=32, cols=32, count=n)) for n in (1, 2, 4)]
    np.testing.assert_allclose(found["cycles"], [r.total_cycles for r in exact], rtol=1e-6)
    with pytest.raises(ValueError, match="count must be a positive integer"):
        array(count=0)
    with pytest.raises(ValueError, match="count is counted with"):
        jax.grad(lambda n: hwmodel.evaluate(NETWORK, array(count=n)).total_cycles)(2.0)


def test_area_and_peak_are_those_of_all_arrays():
    one, two = (hwmodel.array_area_um2(array(count=n)) for n in (1, 2))
    assert two["pes"] == 2 * one["pes"]


def test_the_roofline_has_the_ports_of_every_array():
    narrow = array(sram_bandwidth=4.0)
    roofs = []
    for design in (narrow, dataclasses.replace(narrow, count=13)):
        frame = hwmodel.roofline(hwmodel.evaluate(NETWORK, design), design)
        assert (frame["achieved"] <= frame["attainable"] * (1 + 1e-9)).all()
        roofs.append(frame)
    assert roofs[1].loc["conv", "sram"] == pytest.approx(13 * roofs[0].loc["conv", "sram"])
    assert roofs[1].loc["conv", "compute"] == pytest.approx(13 * roofs[0].loc["conv", "compute"])

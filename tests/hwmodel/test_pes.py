import dataclasses

import pytest
from networks import SMALL

from stp_jax import hwmodel
from stp_jax.hwmodel.technology import MissingEntryError

INT8 = hwmodel.BitParallel()


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


def test_budgets_are_refused_where_a_pe_has_none():
    with pytest.raises(ValueError, match="no budgets"):
        hwmodel.evaluate(SMALL, hwmodel.Array(rows=4, cols=4), budgets=4)


def test_a_dot_product_takes_its_lanes_of_the_reduction_a_cycle():
    network = hwmodel.Network((hwmodel.dense("fc", 20, 6, rows=7),))
    array = hwmodel.Array(rows=2, cols=4, pe=hwmodel.DotProduct(lanes=8))
    report = hwmodel.evaluate(network, array)
    folds = 2 * 2  # three steps on two rows, seven pixels on four columns
    assert report.cycles.item() == folds * (2 * 2 + 4 - 2 + 6)
    pj, macs, steps = hwmodel.HOROWITZ_45NM.energy_pj, 20 * 6 * 7, 3 * 6 * 7
    expected = macs * pj["int8_multiply"] + (macs - steps) * pj["int16_add"]
    assert report.energy_pj["array"].item() == pytest.approx(expected + steps * pj["int32_add"])
    assert report.utilization.item() == pytest.approx(macs / 8 / (2 * 4 * report.cycles.item()))
    with pytest.raises(ValueError, match="positive integer"):
        hwmodel.DotProduct(lanes=0)


def test_a_dot_product_of_one_is_the_bit_parallel_pe():
    one, mac = (
        hwmodel.evaluate(SMALL, hwmodel.Array(rows=4, cols=4, pe=pe))
        for pe in (hwmodel.DotProduct(lanes=1), hwmodel.BitParallel())
    )
    assert one.total_cycles == mac.total_cycles
    assert one.total_energy_pj == pytest.approx(mac.total_energy_pj)
    areas = [p.area_um2(hwmodel.HOROWITZ_45NM) for p in (hwmodel.DotProduct(lanes=1), INT8)]
    assert areas[0] == pytest.approx(areas[1])


def test_wider_multipliers_take_their_own_area():
    wide, table = hwmodel.BitParallel(bits=32), hwmodel.HOROWITZ_45NM
    with pytest.raises(MissingEntryError, match="int32_multiply"):
        wide.area_um2(table)
    known = {**table.area_um2, "int32_multiply": 4000.0}
    with_area = dataclasses.replace(
        table, area_um2=known, sources=(*table.sources, ("area_um2.int32_multiply", "a guess"))
    )
    assert wide.area_um2(with_area) > 3 * INT8.area_um2(with_area)

import pytest
from networks import SMALL

from stp_jax import hwmodel


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

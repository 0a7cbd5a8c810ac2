import numpy as np
import pytest
from networks import SMALL

from stp_jax import hwmodel


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

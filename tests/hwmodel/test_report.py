import dataclasses

import numpy as np
import pytest
from networks import SMALL

from stp_jax import hwmodel


def test_report_exports_every_layer_and_the_total():
    report = hwmodel.evaluate(SMALL, hwmodel.Array(rows=8, cols=12))
    frame = report.to_pandas()
    assert list(frame.index) == list(SMALL.names)
    assert frame["cycles"].sum() == report.total_cycles
    energies = frame[[c for c in frame if c.endswith("_pj")]].to_numpy().sum()
    assert energies == pytest.approx(report.total_energy_pj)
    assert report.table().splitlines()[-1].startswith("total")


def test_the_table_fits_a_terminal():
    name = "encoder.blocks.11.attention.projection"
    network = hwmodel.Network((hwmodel.dense(name, 4096, 16384, rows=2048), *SMALL.layers))
    array = hwmodel.Array(rows=8, cols=12, pe=hwmodel.GroupPE(group_size=8))
    report = hwmodel.evaluate(network, array, budgets=8)
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("projection " in line and line.startswith("…") for line in lines) == 2
    assert sum(line.startswith("total") for line in lines) == 2
    energies = [float(x) for x in lines[-1].split()[1:]]
    assert energies == pytest.approx([1e-6 * e.sum() for e in report.energy_pj.values()], abs=1e-3)


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

import dataclasses

import jax
import numpy as np
import pytest
from networks import resnet18

from stp_jax import hwmodel

NETWORK = resnet18()


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


def test_a_sweep_over_all_devices_agrees_with_single_evaluations():
    swept = hwmodel.sweep(NETWORK, designs(13))
    single = hwmodel.sweep(NETWORK, designs(13), devices=jax.devices()[:1])
    for name, values in swept.items():
        assert values.shape == (13,)
        np.testing.assert_allclose(values, single[name], rtol=1e-6)
    for i in range(13):
        chosen = {name: x[i] if x[i].ndim else x[i].item() for name, x in designs(13).items()}
        budgets, pe = chosen.pop("budgets"), hwmodel.GroupPE(group_size=chosen.pop("group_size"))
        report = hwmodel.evaluate(NETWORK, hwmodel.Array(pe=pe, **chosen), budgets=budgets)
        np.testing.assert_allclose(swept["cycles"][i], report.total_cycles, rtol=1e-5)
        np.testing.assert_allclose(swept["dram_pj"][i], report.energy_pj["dram"].sum(), rtol=1e-5)


def test_sweeps_of_a_subclass_keep_its_other_numbers():
    pe = hwmodel.TermMac(data_terms=2)
    swept = hwmodel.sweep(NETWORK, {"group_size": [4, 8], "budgets": [4, 4]}, pe=pe)
    for i, g in enumerate((4, 8)):
        array = hwmodel.Array(rows=32, cols=32, pe=hwmodel.TermMac(data_terms=2, group_size=g))
        report = hwmodel.evaluate(NETWORK, array, budgets=4)
        np.testing.assert_allclose(swept["cycles"][i], report.total_cycles, rtol=1e-6)


def test_sweeps_by_gates_take_the_pe_that_was_measured():
    technology = hwmodel.NANGATE_45NM_GATES
    swept = hwmodel.sweep(NETWORK, {"rows": [16, 32], "budgets": [4, 8]}, technology=technology)
    for i, (rows, k) in enumerate(((16, 4), (32, 8))):
        array = hwmodel.Array(rows=rows, cols=32, pe=hwmodel.GroupPE(group_size=8))
        report = hwmodel.evaluate(NETWORK, array, budgets=k, technology=technology)
        for name in ("array", "encoder"):
            expected = report.energy_pj[name].sum()
            np.testing.assert_allclose(swept[f"{name}_pj"][i], expected, rtol=1e-5)
        np.testing.assert_allclose(swept["dram_bytes"][i], report.dram_bytes.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"colour": [1]}, "cannot sweep"),
        ({}, "cannot sweep"),
        ({"rows": [1, 2], "cols": [1]}, "one value a design"),
        ({"rows": [0]}, "positive whole"),
        ({"rows": [1.5]}, "positive whole"),
        ({"budgets": [[1, 2]]}, "shape"),
        ({"budgets": [9], "group_size": [2]}, "exceed"),
    ],
)
def test_bad_sweeps_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        hwmodel.sweep(NETWORK, bad)


# 3.3e9 inputs, 6.6e10 outputs: more than 32 bits count.
LARGE = hwmodel.Network(
    (hwmodel.conv("c", (224, 224), channels=64, filters=64, kernel=(3, 3), batch=1024),)
)
ARRAY = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


@pytest.mark.parametrize("size", [2**31, 2**33])
def test_large_counts_and_buffers_do_not_wrap_in_sweeps(size):
    exact = hwmodel.evaluate(LARGE, dataclasses.replace(ARRAY, filter_sram=size), budgets=8)
    designs = {"rows": [32], "filter_sram": [size], "budgets": [8]}
    swept = hwmodel.sweep(LARGE, designs)
    for name, energy in exact.energy_pj.items():
        np.testing.assert_allclose(swept[f"{name}_pj"], energy.sum(), rtol=1e-5)

"""Traced evaluations: 32-bit counts that do not wrap, and what may be differentiated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax import hwmodel

# 3.3e9 inputs, 6.6e10 outputs: more than 32 bits count.
LARGE = hwmodel.Network(
    (hwmodel.conv("c", (224, 224), channels=64, filters=64, kernel=(3, 3), batch=1024),)
)
ARRAY = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


def test_large_counts_do_not_wrap_where_budgets_are_traced():
    exact = hwmodel.evaluate(LARGE, ARRAY, budgets=8)
    traced = jax.jit(lambda k: hwmodel.evaluate(LARGE, ARRAY, budgets=k))(jnp.float32(8))
    assert exact.dram_bytes[0] > 2**32
    np.testing.assert_allclose(traced.cycles, exact.cycles, rtol=1e-6)
    np.testing.assert_allclose(traced.dram_bytes, exact.dram_bytes, rtol=1e-6)
    for name, energy in exact.energy_pj.items():
        np.testing.assert_allclose(traced.energy_pj[name], energy, rtol=1e-5)


@pytest.mark.parametrize("size", [2**31, 2**33])
def test_large_counts_and_buffers_do_not_wrap_in_sweeps(size):
    exact = hwmodel.evaluate(LARGE, dataclasses.replace(ARRAY, filter_sram=size), budgets=8)
    designs = {"rows": [32], "filter_sram": [size], "budgets": [8]}
    swept = hwmodel.sweep(LARGE, designs)
    for name, energy in exact.energy_pj.items():
        np.testing.assert_allclose(swept[f"{name}_pj"], energy.sum(), rtol=1e-5)


def test_extents_that_need_more_than_32_bits_are_refused_by_name():
    network = hwmodel.Network(
        (hwmodel.dense("fc", 8, 4), hwmodel.dense("wide", 64, 64, rows=2**31))
    )
    assert hwmodel.evaluate(network, ARRAY, budgets=8).cycles[1] > 2**31
    with pytest.raises(ValueError, match=r"wide: P = 2147483648 is 2\*\*31 or more"):
        hwmodel.sweep(network, {"rows": [32], "budgets": [8]})
    with pytest.raises(ValueError, match="rows is 2147483648"):
        hwmodel.sweep(LARGE, {"rows": [2**31]})


def test_gradients_exist_over_continuous_sizes_and_are_refused_over_counted_ones():
    network = hwmodel.Network((hwmodel.dense("fc", 512, 1000, rows=64),))

    def energy(**sizes):
        return hwmodel.evaluate(network, dataclasses.replace(ARRAY, **sizes)).total_energy_pj

    assert jax.grad(lambda x: energy(filter_sram=x))(2.0**17) > 0
    for name in ("rows", "cols"):
        with pytest.raises(ValueError, match=f"{name} is counted with"):
            jax.grad(lambda x, name=name: energy(**{name: x}))(32.0)
    with pytest.raises(ValueError, match="group_size is counted with"):
        jax.grad(lambda x: energy(pe=hwmodel.GroupPE(group_size=x)))(8.0)


def test_digit_serial_pes_run_with_a_traced_technology():
    network = hwmodel.Network((hwmodel.dense("fc", 40, 30, rows=3),))
    weights = {"fc": np.random.default_rng(0).integers(-127, 128, (40, 30))}
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitWave())

    def report(technology):
        return hwmodel.evaluate(network, array, weights=weights, technology=technology)

    exact, traced = report(hwmodel.HOROWITZ_45NM), jax.jit(report)(hwmodel.HOROWITZ_45NM)
    np.testing.assert_array_equal(traced.cycles, exact.cycles)
    np.testing.assert_allclose(traced.total_energy_pj, exact.total_energy_pj, rtol=1e-6)

    def saving(technology):
        base = dataclasses.replace(array, pe=hwmodel.BitParallel())
        base = hwmodel.evaluate(network, base, technology=technology)
        return hwmodel.computational_saving(base, report(technology))

    assert hwmodel.sensitivity(saving).loc["int8_multiply", "elasticity"] == pytest.approx(2 / 3)


def test_counts_of_a_traced_technology_do_not_wrap():
    evaluated = jax.jit(lambda t: hwmodel.evaluate(LARGE, ARRAY, budgets=8, technology=t))
    exact = hwmodel.evaluate(LARGE, ARRAY, budgets=8)
    report = evaluated(hwmodel.HOROWITZ_45NM)
    np.testing.assert_allclose(report.dram_bytes, exact.dram_bytes, rtol=1e-6)
    np.testing.assert_allclose(report.operations["macs"], exact.operations["macs"], rtol=1e-6)

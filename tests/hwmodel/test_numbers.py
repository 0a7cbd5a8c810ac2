import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax import hwmodel
from stp_jax.hwmodel.numbers import as_arrays, namespace_for, namespace_of

ARRAY = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


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


def test_a_concrete_design_is_exact_and_its_integers_stay_concrete():
    array = hwmodel.Array(rows=2**40 + 1, cols=8.0, filter_sram=3, pe=hwmodel.GroupPE())
    exact = as_arrays(array, np)
    assert (exact.rows, exact.cols, exact.pe.group_size) == (2**40 + 1, 8, 8)
    assert exact.rows.dtype == exact.pe.group_size.dtype == np.int64
    assert exact.filter_sram.dtype == np.float64
    with pytest.raises(ValueError, match="rows is 1099511627777; traced evaluations count in 32"):
        as_arrays(array, jnp)
    traced = as_arrays(dataclasses.replace(array, rows=4), jnp)
    assert isinstance(traced.rows, np.int32)
    assert isinstance(traced.pe.group_size, np.int32)
    assert isinstance(traced.filter_sram, jax.Array)
    assert traced.filter_sram.dtype == np.float32


def test_a_subclass_of_ones_own_gets_arrays():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Slow(hwmodel.BitParallel):
        """Takes ``factor`` cycles a step."""

        factor: float = 2.5

        def activity(self, work):
            single = super().activity(work)
            return dataclasses.replace(single, cycles=self.factor * single.cycles)

    network = hwmodel.Network((hwmodel.dense("fc", 512, 1000),))

    def streaming(factor):
        array = hwmodel.Array(rows=32, cols=32, pe=Slow(factor=factor))
        return (
            hwmodel.evaluate(network, array).cycles
            - hwmodel.arrays.fold(network, array).fill_cycles
        )

    assert streaming(2.5) == 2.5 * streaming(1.0)
    assert jax.grad(lambda factor: streaming(factor).sum())(2.5) == streaming(1.0)[0]


def test_numbers_are_computed_in_their_arrays_own_library():
    assert namespace_of(1.0, np.float64(2), np.ones(3)) is np
    assert namespace_of(np.ones(3), jnp.ones(3)) is jnp
    assert namespace_for({"a": 1.0, "b": jnp.ones(3)}) is np  # concrete, so exact
    assert jax.jit(lambda x: x * float(namespace_for({"a": x}) is jnp))(1.0) == 1.0

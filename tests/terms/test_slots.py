"""The slot format: widths from first principles, for integers, arrays and traced values alike."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.terms.slots import slot_format

SIZES, BUDGETS, WIDTHS = (1, 2, 3, 7, 8, 9, 16), (1, 2, 12), (1, 2, 5, 8, 11)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", SIZES)
def test_fields_are_just_wide_enough(size, bits):
    for budget in BUDGETS:
        form = slot_format(size, budget, bits)
        assert 2**form.exponent_bits >= bits > 2**form.exponent_bits // 2
        assert 2**form.index_bits >= size > 2**form.index_bits // 2
        codes, used = 2 ** (form.stored_bits - 1), bits * size
        # A code of its own is left for the empty slot where no slot before can mark it.
        assert codes > used if budget == 1 else codes >= used
        assert form.stored_bits <= form.wire_bits == 2 + form.exponent_bits + form.index_bits
        assert all(isinstance(width, int) for width in form)


def test_arrays_and_traced_values_have_the_same_widths():
    sizes, budgets = map(np.array, zip(*itertools.product(SIZES, BUDGETS), strict=True))
    for bits in WIDTHS:
        expected = [slot_format(*pair, bits) for pair in itertools.product(SIZES, BUDGETS)]
        stored = [form.stored_bits for form in expected]
        wire = [form.wire_bits for form in expected]
        counted = slot_format(sizes.astype(float), budgets.astype(float), bits)
        np.testing.assert_array_equal(counted.stored_bits, stored)
        np.testing.assert_array_equal(counted.wire_bits, wire)
        traced = jax.jit(slot_format, static_argnums=2)(
            jnp.asarray(sizes, jnp.float32), jnp.asarray(budgets, jnp.float32), bits
        )
        chex.assert_trees_all_equal(traced.stored_bits, jnp.asarray(stored, jnp.float32))
        chex.assert_trees_all_equal(traced.wire_bits, jnp.asarray(wire, jnp.float32))


def test_a_groups_bits_grow_continuously_with_a_real_budget():
    budgets = np.linspace(0.01, 3, 300)
    total = budgets * slot_format(8, budgets).stored_bits
    steps = np.diff(total) / np.diff(budgets)
    assert steps.min() == pytest.approx(6) and steps.max() == pytest.approx(8)
    np.testing.assert_allclose(np.interp([1, 2, 3], budgets, total), [8, 14, 21], rtol=1e-3)

"""The Pallas kernel, interpreted: its sums are the dense product's, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.terms import pack, packed_dot, packed_matmul, project, wire_slots


def kernel(shape, axis, group_size, budget, seed=0, bits=8):
    w = np.random.default_rng(seed).normal(0, 40, shape)
    options = {"group_size": group_size, "budget": budget, "axis": axis, "bits": bits}
    v = np.asarray(project(w, **options))
    return v, pack(v, **options)


@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "budget"),
    [
        ((200, 150), 0, 8, 6),  # more than one block of rows, groups and outputs, all ragged
        ((40, 24), 0, 8, 1),  # a single slot, which is marked otherwise in the stream
        ((24, 40), 1, 8, 4),  # transposed
        ((33, 5), 0, 3, 2),  # groups of no power of two
        ((70, 9), 0, 16, 5),  # slots of more than a byte
    ],
)
def test_sums_are_the_dense_products(shape, axis, group_size, budget):
    v, packed = kernel(shape, axis, group_size, budget)
    slots = wire_slots(packed)
    dense = v if axis == 0 else v.T
    for dtype in (np.int8, np.int32):
        x = np.random.default_rng(1).integers(-128, 128, (2, 70, len(dense))).astype(dtype)
        found = packed_matmul(x, slots)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, x.astype(np.int64) @ dense)
        np.testing.assert_array_equal(found, packed_dot(x, packed))


def test_budgets_by_filter_and_no_terms():
    budgets = np.arange(20)[None] % 5
    v, packed = kernel((24, 20), 0, 8, budgets)
    x = np.random.default_rng(1).integers(-128, 128, (3, 24)).astype(np.int8)
    np.testing.assert_array_equal(packed_matmul(x, wire_slots(packed)), x.astype(np.int64) @ v)
    nothing = pack(np.zeros((24, 20), int), group_size=8, budget=0, axis=0)
    np.testing.assert_array_equal(packed_matmul(x, wire_slots(nothing)), np.zeros((3, 20)))


def test_weights_and_sums_beyond_their_type():
    packed = pack([[128, -128], [1, 127]], group_size=2, budget=3, axis=0)
    slots = wire_slots(packed)
    assert not slots.fits_int8
    x = np.array([[-128, 127]], np.int8)
    np.testing.assert_array_equal(packed_matmul(x, slots), [[-16257, 32513]])
    huge = np.array([[2**30, 2**30]], np.int32)  # both paths wrap
    np.testing.assert_array_equal(packed_matmul(huge, slots), packed_dot(huge, packed))


def test_slots_are_bytes_and_trace():
    v, packed = kernel((64, 16), 0, 8, 4)
    slots = wire_slots(packed)
    assert slots.codes.dtype == jnp.uint8
    assert slots.codes.nbytes * 2 == v.size
    x = jnp.ones((4, 64), jnp.int8)
    jitted = jax.jit(packed_matmul)
    np.testing.assert_array_equal(jitted(x, slots), np.tile(v.sum(axis=0), (4, 1)))


def test_bad_input_is_refused():
    _, packed = kernel((16, 4), 0, 8, 4)
    slots = wire_slots(packed)
    for x in (jnp.ones((2, 16)), jnp.ones((2, 15), jnp.int8)):
        with pytest.raises(ValueError, match="integers"):
            packed_matmul(x, slots)
    with pytest.raises(TypeError, match="WireSlots"):
        packed_matmul(jnp.ones((2, 16), jnp.int8), packed)
    _, conv = kernel((3, 16, 4), 1, 8, 4)
    with pytest.raises(ValueError, match="two axes"):
        wire_slots(conv)
    wide = pack(np.zeros((600, 2), int), group_size=512, budget=4, axis=0, bits=16)
    assert wide.format.wire_bits == 15
    wider = pack(np.zeros((600, 2), int), group_size=2048, budget=4, axis=0, bits=16)
    with pytest.raises(ValueError, match="17 bits"):
        wire_slots(wider)

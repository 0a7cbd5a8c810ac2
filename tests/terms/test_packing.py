"""Packed term streams: round trips, slot format, lower bound, and shift-and-add products."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax import terms
from stp_jax.terms.packing import pack, packed_dot, read_slots, stream_lower_bound
from stp_jax.terms.slots import slot_format

SHAPES = [(0,), (7,), (9, 4), (3, 8), (2, 5, 3)]


@st.composite
def within_budget(draw, shapes):
    """Integers, and options with a budget that the fullest group reaches or nearly reaches."""
    bits = draw(st.sampled_from([1, 2, 5, 8, 11]))
    group_size = draw(st.sampled_from([1, 3, 4, 8]))
    encoding = draw(st.sampled_from(list(terms.ENCODINGS)))
    shape = draw(st.sampled_from(shapes))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = 1 << (bits - 1)
    v = rng.integers(-top, top + 1, shape)
    v = np.where(rng.integers(0, 4, shape) == 0, top, v)  # the largest value is often there
    v = v * (rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 1.0])))
    held = np.moveaxis(np.asarray(terms.count(v, encoding, bits)), axis, -1)
    starts = np.arange(0, shape[axis], group_size)
    fullest = int(np.add.reduceat(held, starts, axis=-1).max()) if v.size else 0
    most = terms.max_budget(group_size, encoding, bits)
    budget = draw(st.integers(fullest, min(most, fullest + 3)))
    return v, {
        "group_size": group_size,
        "budget": budget,
        "axis": axis,
        "encoding": encoding,
        "bits": bits,
    }


@settings(max_examples=50)  # each compiles programs of its own
@given(within_budget(SHAPES))
def test_round_trip(problem):
    v, options = problem
    packed = pack(v, **options)
    assert terms.unpack(packed).tolist() == v.tolist()
    assert packed.nbytes == math.ceil(packed.bits_per_weight * v.size / 8)


@settings(max_examples=20)
@given(within_budget([(9, 4), (3, 8), (2, 5, 3)]), st.integers(0, 2**32 - 1))
def test_filters_with_slots_of_their_own_are_streams_one_after_the_other(problem, seed):
    v, options = problem
    axis, top = (
        options["axis"] % v.ndim,
        terms.max_budget(options["group_size"], options["encoding"], options["bits"]),
    )
    apart = tuple(1 if a == axis else n for a, n in enumerate(v.shape))
    budgets = np.random.default_rng(seed).integers(options["budget"], top + 1, apart)
    zero = np.random.default_rng(seed + 1).random(apart) < 0.2
    v, budgets = np.where(zero, 0, v), np.where(zero, 0, budgets)
    packed = pack(v, **options | {"budget": budgets})
    assert terms.unpack(packed).tolist() == v.tolist()
    rows, bits = np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]), ""
    for row, k in zip(rows, budgets.reshape(-1).tolist(), strict=True):
        alone = pack(row, **options | {"budget": k, "axis": 0})
        length = alone.groups * k * alone.format.stored_bits
        bits += "".join(f"{byte:08b}" for byte in alone.data.tolist())[:length]
    assert "".join(f"{byte:08b}" for byte in packed.data.tolist())[: len(bits)] == bits
    assert packed.nbytes == math.ceil(len(bits) / 8)
    equal = pack(v, **options | {"budget": np.full(apart, options["budget"])})
    np.testing.assert_array_equal(equal.data, pack(v, **options).data)
    if v.ndim == 2:
        kernel = v if axis == 0 else v.T
        x = np.random.default_rng(seed).integers(-128, 128, (3, len(kernel))).astype(np.int32)
        np.testing.assert_array_equal(packed_dot(x, packed), x @ kernel)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_value_round_trips_in_as_many_slots_as_it_has_terms(encoding, bits):
    top = 1 << (bits - 1)
    values = np.arange(-top, top + 1)
    most = terms.max_terms(encoding, bits)
    packed = pack(values, group_size=1, budget=most, axis=0, encoding=encoding, bits=bits)
    assert terms.unpack(packed).tolist() == values.tolist()
    used = np.count_nonzero(read_slots(packed).sign, axis=1)
    has = np.asarray(terms.count(values, encoding, bits))
    if most > 1:
        has = np.where(values == 0, 2, has)  # +1 - 1
    assert (used <= has).all()
    # One form is stored shorter: Booth's top value, where it needs an exponent of its own.
    shorter = values[used < has].tolist()
    assert shorter == ([top] if encoding == "booth4" and bits % 2 == 0 else [])


def test_stream_is_slots_of_sign_exponent_index_largest_exponent_first():
    # 7 = 8 - 1 on member 2, -12 = -16 + 4 on member 0: four terms, one slot empty.
    packed = pack([-12, 0, 7, 0], group_size=4, budget=5, axis=0)
    slots = [
        0b1_100_00,  # -2**4, member 0
        0b0_011_10,  # +2**3, member 2
        0b0_010_00,  # +2**2, member 0
        0b1_000_10,  # -2**0, member 2
        0b1_000_10,  # repeated: empty
    ]
    written = int.from_bytes(packed.data.tobytes(), "big")
    assert packed.nbytes == 4
    assert written == int("".join(f"{slot:06b}" for slot in slots) + "00", 2)


def test_groups_follow_each_other_along_the_reduction():
    v = np.arange(24).reshape(6, 4) % 5
    packed = pack(v, group_size=2, budget=4, axis=0)
    slots = read_slots(packed)
    members = np.zeros((packed.groups, 2), int)
    np.add.at(members, (np.arange(12)[:, None], slots.member), slots.sign << slots.exponent)
    assert members.reshape(4, 6).tolist() == v.T.tolist()


@pytest.mark.parametrize(
    ("group_size", "budget", "bits", "expected"),
    [
        (8, 12, 8, 7),  # sign, 8 exponents, 8 members
        (8, 1, 8, 8),  # every code is a term, so the empty slot needs a bit
        (8, 1, 7, 7),  # 7 exponents leave a code for it
        (7, 1, 8, 7),  # 7 members too
        (1, 4, 8, 4),
        (16, 16, 8, 8),
    ],
)
def test_slot_width(group_size, budget, bits, expected):
    assert slot_format(group_size, budget, bits).stored_bits == expected
    v = np.zeros((3 * group_size, 5), np.int32)
    packed = pack(v, group_size=group_size, budget=budget, axis=0, bits=bits)
    assert packed.bits_per_weight == pytest.approx(expected * budget / group_size)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
@pytest.mark.parametrize("bits", [2, 4])
def test_lower_bound_counts_the_groups_that_fit(encoding, bits):
    top = 1 << (bits - 1)
    values = np.arange(-top, top + 1)
    held = np.asarray(terms.count(values, encoding, bits)).tolist()
    for size in (1, 2, 3):
        totals = [sum(group) for group in itertools.product(held, repeat=size)]
        for budget in range(terms.max_budget(size, encoding, bits) + 1):
            ways = sum(total <= budget for total in totals)
            bound = stream_lower_bound(size, budget, encoding, bits)
            assert 2**bound == pytest.approx(ways, rel=1e-9)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
def test_no_stream_is_below_the_bound(encoding):
    for size, bits in itertools.product((1, 4, 7, 8), (4, 7, 8)):
        for budget in range(terms.max_budget(size, encoding, bits) + 1):
            stored = budget * slot_format(size, budget, bits).stored_bits
            assert stored >= stream_lower_bound(size, budget, encoding, bits) - 1e-9


@settings(max_examples=30)
@given(
    within_budget([(9, 4), (3, 8)]),
    st.sampled_from([(), (2, 3), (0,)]),
    st.integers(0, 2**32 - 1),
)
def test_packed_dot_is_the_integer_product(problem, lead, seed):
    v, options = problem
    kernel = v if options["axis"] % 2 == 0 else v.T
    x = np.random.default_rng(seed).integers(-128, 128, (*lead, len(kernel)))
    out = packed_dot(x.astype(np.int32), pack(v, **options))
    assert out.dtype == np.int32
    assert np.array_equal(out, x @ kernel)


def test_packed_dot_wraps_as_int32_does():
    kernel = np.full((512, 1), 1 << 23, np.int32)
    x = np.arange(512, dtype=np.int32)[None]
    packed = pack(kernel, group_size=4, budget=4, axis=0, bits=24)
    with np.errstate(over="ignore"):
        assert np.array_equal(packed_dot(x, packed), x @ kernel)


def test_group_over_its_budget_is_named():
    v = np.array([[1, 0, 0, 0, 11, 5, 3, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"group 1 of 4 holds 8 terms.*budget of 4.*11, 5, 3, 1"):
        pack(v, group_size=4, budget=4, axis=1)
    with pytest.raises(ValueError, match="budget of 0 holds zeros only"):
        pack(v, group_size=4, budget=0, axis=1)


@pytest.mark.parametrize(
    ("v", "options", "message"),
    [
        ([1.5], {}, "integers"),
        ([129], {}, r"\[-128, 128\]"),
        ([1], {"axis": 1}, "axis 1 does not exist"),
        ([1], {"group_size": 0}, "group_size"),
        ([1], {"budget": 99}, "outside"),
        ([1], {"encoding": "unary"}, "unknown encoding"),
    ],
)
def test_bad_arguments(v, options, message):
    with pytest.raises(ValueError, match=message):
        pack(np.asarray(v), **{"group_size": 4, "budget": 2, "axis": 0, **options})


def test_damaged_stream_is_refused():
    packed = pack([1, 2, 4], group_size=3, budget=3, axis=0, bits=5)
    options = {"shape": (3,), "axis": 0, "group_size": 3, "budget": 3, "bits": 5}
    with pytest.raises(ValueError, match=r"takes uint8\[3\]"):
        terms.PackedTerms(data=packed.data[:2], **options)
    with pytest.raises(ValueError, match="slot 0 of group 0 names exponent 7"):
        read_slots(terms.PackedTerms(data=np.full(3, 0xFF, np.uint8), **options))


def test_packed_dot_refuses_what_is_no_dense_layer():
    packed = pack(np.zeros((4, 2), int), group_size=4, budget=2, axis=0)
    with pytest.raises(ValueError, match=r"x must hold integers \[\.\.\., 4\]"):
        packed_dot(np.zeros((2, 3), np.int32), packed)
    with pytest.raises(ValueError, match="x must hold integers"):
        packed_dot(np.zeros((2, 4), np.float32), packed)
    cube = pack(np.zeros((4, 2, 1), int), group_size=4, budget=2, axis=0)
    with pytest.raises(ValueError, match="two axes"):
        packed_dot(np.zeros((2, 4), np.int32), cube)

"""Encodings against their definitions and published counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_jax import terms

ENCODINGS = st.sampled_from(list(terms.ENCODINGS))


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
@pytest.mark.parametrize("bits", [1, 4, 8, 11])
def test_decode_inverts_encode_on_the_whole_range(encoding, bits):
    top = (1 << bits) - 1
    q = jnp.arange(-top, top + 1)
    digits = terms.encode(q, encoding, bits)
    assert digits.shape == (2 * top + 1, terms.num_digits(encoding, bits))
    assert set(np.unique(digits)) <= {-1, 0, 1}
    np.testing.assert_array_equal(terms.decode(digits, encoding), q)
    np.testing.assert_array_equal(terms.count(q, encoding, bits), jnp.sum(jnp.abs(digits), axis=-1))


@pytest.mark.parametrize(
    ("encoding", "mean"), [("binary", 4.0), ("booth4", 3.5), ("hese", 3.25), ("naf", 3.109375)]
)
def test_mean_terms_of_unsigned_bytes(encoding, mean):
    assert float(terms.count(jnp.arange(256), encoding).mean()) == mean


@pytest.mark.parametrize("bits", range(1, 17))
def test_total_naf_terms_follow_the_closed_form(bits):
    # Sum over [0, 2^B): ((3B+4)*2^B - (9-(-1)^B)/2) / 9; 355 at B=7, 796 at B=8.
    expected = ((3 * bits + 4) * 2**bits - (9 - (-1) ** bits) // 2) // 9
    assert int(terms.count(jnp.arange(2**bits), "naf", bits).sum()) == expected


@given(st.integers(-(2**16) + 1, 2**16 - 1))
def test_naf_has_no_adjacent_digits_and_fewest_terms(value):
    digits = np.asarray(terms.encode(value, "naf", 16))
    assert not np.any(digits[1:] * digits[:-1])
    assert int(terms.count(value, "naf", 16)) == bin(abs(value) ^ (3 * abs(value))).count("1")


@given(st.integers(-255, 255), ENCODINGS)
def test_no_encoding_has_fewer_terms_than_naf(value, encoding):
    assert int(terms.count(value, "naf")) <= int(terms.count(value, encoding))


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
@pytest.mark.parametrize("bits", range(1, 11))
def test_max_terms_is_reached_and_never_exceeded(encoding, bits):
    top = 1 << (bits - 1)
    counts = terms.count(jnp.arange(-top, top + 1), encoding, bits)
    assert terms.max_terms(encoding, bits) == int(counts.max())


def test_booth4_digits_are_those_of_the_radix_4_recoding():
    q = np.arange(-128, 128)
    digits = np.asarray(terms.encode(q, "booth4"))
    bit = lambda i: (q >> i) & 1 if i >= 0 else np.zeros_like(q)  # noqa: E731
    for i in range(4):
        radix4 = -2 * bit(2 * i + 1) + bit(2 * i) + bit(2 * i - 1)
        np.testing.assert_array_equal(digits[:, 2 * i] + 2 * digits[:, 2 * i + 1], radix4)


def test_hese_replaces_runs_and_keeps_single_ones():
    assert terms.encode(0b0101, "hese", 4).tolist() == [1, 0, 1, 0, 0]
    assert terms.encode(0b0110, "hese", 4).tolist() == [0, -1, 0, 1, 0]
    assert int(terms.count(0b11011, "hese")) == 4  # one more than the NAF's 100-10-1


def test_works_under_jit_and_vmap():
    q = jnp.arange(-8, 8).reshape(4, 4)
    expected = terms.encode(q)
    np.testing.assert_array_equal(jax.jit(terms.encode)(q), expected)
    np.testing.assert_array_equal(jax.vmap(terms.encode)(q), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, "nav"), ValueError, "unknown encoding 'nav'; choose one of binary, booth4, naf, hese"),
        ((5, "naf", 0), ValueError, "bits must be an integer from 1 to 24"),
        ((5, "naf", 8.0), ValueError, "bits must be an integer"),
        ((256, "naf", 8), ValueError, "256 does not fit bits=8"),
        ((0.5,), TypeError, "divide by the scale, round and cast"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        terms.encode(*arguments)


def test_decode_needs_digits():
    with pytest.raises(ValueError, match="at least one axis"):
        terms.decode(jnp.int32(1))

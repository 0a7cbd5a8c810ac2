"""Terms of activations: the best and the largest terms, and the quantizer's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax import terms
from stp_jax.terms.activations import activation_integers
from stp_jax.terms.codebook import few_term_values


def every_integer(bits):
    top = 1 << (bits - 1)
    return np.arange(-top, top + 1)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_optimal_is_a_nearest_value_of_so_many_terms(encoding, bits):
    q = every_integer(bits)
    for most in range(1, terms.max_terms(encoding, bits) + 1):
        v = np.asarray(terms.limit_terms(q, most, encoding=encoding, bits=bits)).astype(int)
        values = few_term_values(most, encoding, bits)
        assert terms.count(v, encoding, bits).max() <= most
        nearest = np.min(np.abs(q[:, None] - values[None]), axis=1)
        np.testing.assert_array_equal(np.abs(q - v), nearest)


@pytest.mark.parametrize("encoding", terms.ENCODINGS)
def test_greedy_keeps_the_largest_terms(encoding):
    q = every_integer(8)
    digits = np.asarray(terms.encode(q, encoding))
    for most in range(1, terms.max_terms(encoding) + 2):
        held = np.cumsum(digits[:, ::-1] != 0, axis=1)[:, ::-1]  # terms from this one up
        kept = np.where(held <= most, digits, 0)
        v = terms.limit_terms(q, most, method="greedy", encoding=encoding)
        np.testing.assert_array_equal(v, terms.decode(kept, encoding))


def test_term_revealing_of_data_in_figures():
    """The paper's way with 7 = 8 - 1 and 11 = 16 - 4 - 1: the largest terms stay."""
    cut = terms.limit_terms([7, 11, 127], 1, method="greedy")
    assert cut.tolist() == [8, 16, 128]
    assert terms.limit_terms([7, 11, 127], 2, method="greedy").tolist() == [7, 12, 127]


@settings(max_examples=25)
@given(
    st.lists(st.floats(-400, 400, width=32), min_size=4, max_size=4),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(list(terms.METHODS)),
    st.sampled_from(["naf", "hese"]),
)
def test_quantizer_is_scale_times_its_integers_under_jit(x, most, bits, method, encoding):
    options = {"bits": bits, "terms": most, "method": method, "encoding": encoding}
    x, scale = jnp.asarray(x, jnp.float32), jnp.full((1,), 2.0, jnp.float32)
    v = np.asarray(activation_integers(x, scale, **options))
    largest = (1 << (bits - 1)) - 1
    rounded = np.clip(np.round(np.asarray(x) / 2), -largest, largest)
    np.testing.assert_array_equal(
        v, terms.limit_terms(rounded, most, method=method, encoding=encoding, bits=bits)
    )
    run = jax.jit(lambda x, scale: terms.quantize_activations(x, scale, **options))
    np.testing.assert_array_equal(run(x, scale), 2 * v)


@pytest.mark.parametrize("most", [None, 1])
def test_gradients_pass_straight_through_and_follow_lsq(most):
    """With u = x / s: to x, g inside the range; to s, g (v - u) inside and g v outside."""
    x = jnp.asarray([[0.3, -2.2, 6.1, 500.0, -500.0, 11.4]], jnp.float32)
    scale = jnp.full((1, 1), 0.5, jnp.float32)
    g = jnp.asarray([[1.0, -2.0, 0.5, 3.0, 1.0, 0.25]], jnp.float32)
    q, vjp = jax.vjp(lambda x, s: terms.quantize_activations(x, s, terms=most), x, scale)
    to_x, to_scale = vjp(g)
    u, v = np.asarray(x) / 0.5, np.asarray(q) / 0.5
    inside = np.abs(u) <= 127
    np.testing.assert_array_equal(to_x, np.where(inside, g, 0))
    expected = np.sum(g * np.where(inside, v - u, v)) / np.sqrt(6 * 127)
    np.testing.assert_allclose(to_scale[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("most", [None, 1])
def test_a_scale_of_zero_lets_values_and_gradients_pass(most):
    """What an input without calibration needs; the scale of 2 beside it quantizes."""
    x = jnp.asarray([[0.3, -700.0, 6.1], [0.3, -700.0, 6.1]], jnp.float32)
    scale = jnp.asarray([[0.0], [2.0]], jnp.float32)
    g = jnp.asarray([[1.0, -2.0, 0.5], [1.0, -2.0, 0.5]], jnp.float32)
    q, vjp = jax.vjp(lambda x, s: terms.quantize_activations(x, s, terms=most), x, scale)
    to_x, to_scale = vjp(g)
    np.testing.assert_array_equal(q[0], x[0])
    np.testing.assert_array_equal(to_x, [g[0], [1.0, 0.0, 0.5]])
    assert to_scale[0, 0] == 0.0
    alone, vjp = jax.vjp(
        lambda x, s: terms.quantize_activations(x, s, terms=most), x[1:], scale[1:]
    )
    np.testing.assert_array_equal(q[1:], alone)
    np.testing.assert_array_equal(to_scale[1:], vjp(g[1:])[1])


def test_dtype_is_kept_and_vmap_is_a_loop():
    x = jnp.linspace(-3, 3, 24, dtype=jnp.bfloat16).reshape(2, 3, 4)
    scale = jnp.full((1, 1), 0.05, jnp.float32)
    run = lambda x: terms.quantize_activations(x, scale, terms=2)  # noqa: E731
    out = jax.vmap(run)(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.stack([run(x[0]), run(x[1])]))


@pytest.mark.parametrize("most", [0, -1, 1.5])
def test_bad_terms(most):
    with pytest.raises(ValueError, match="terms of an activation"):
        terms.limit_terms([1], most)


def test_bad_arguments():
    x = jnp.ones((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="scale of shape"):
        terms.quantize_activations(x, jnp.ones((3,), jnp.float32))
    with pytest.raises(ValueError, match="bits must be 2"):
        terms.quantize_activations(x, jnp.ones((1, 1), jnp.float32), bits=1)
    with pytest.raises(ValueError, match="unknown method"):
        terms.limit_terms([1], 1, method="best")

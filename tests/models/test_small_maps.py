"""The matrix product for small maps equals XLA's convolution, gradients and integers included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax.models.small_maps import conv_general_dilated

NUMBERS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_equals_xla(size, stride, window):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=(3, size, size, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(window, window, 4, 5)), jnp.float32)
    pad = ((window // 2, window // 2),) * 2
    arguments = ((stride, stride), pad)

    def ours(x, w):
        return conv_general_dilated(x, w, *arguments, dimension_numbers=NUMBERS)

    def theirs(x, w):
        return jax.lax.conv_general_dilated(x, w, *arguments, dimension_numbers=NUMBERS)

    np.testing.assert_allclose(ours(x, w), theirs(x, w), rtol=1e-5, atol=1e-5)
    for argument in (0, 1):
        gradients = [
            jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), argument)(x, w)
            for f in (ours, theirs)
        ]
        np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_integers_are_exact():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-127, 128, (2, 2, 2, 600)), jnp.int8)
    w = jnp.asarray(rng.integers(-127, 128, (3, 3, 600, 2)), jnp.int8)
    y = conv_general_dilated(
        x,
        w,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=NUMBERS,
        preferred_element_type=jnp.int32,
    )
    padded = np.pad(np.asarray(x, np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        padded[:, i : i + 2, j : j + 2] @ np.asarray(w, np.int64)[i, j]
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_array_equal(y, expected)


def test_grouped_and_dilated_convolutions_go_to_xla():
    x, w = jnp.ones((1, 2, 2, 4), jnp.float32), jnp.ones((3, 3, 1, 4), jnp.float32)
    pad = ((1, 1), (1, 1))
    y = conv_general_dilated(x, w, (1, 1), pad, dimension_numbers=NUMBERS, feature_group_count=4)
    np.testing.assert_array_equal(y, jnp.full((1, 2, 2, 4), 4.0))

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from stp_jax import hwmodel
from stp_jax.hwmodel.readers.products import convolution, einsum


@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), "SAME", "VALID", "CIRCULAR", 2])
def test_traced_convolutions_have_their_padding(padding):
    options = {"strides": 2, "padding": padding, "kernel_dilation": (1, 2)}
    x = jax.ShapeDtypeStruct((1, 9, 8, 3), jnp.float32)
    (ours,) = hwmodel.trace(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), **options), x)
    (theirs,) = hwmodel.trace(linen.Conv(4, (3, 3), **options), x)
    assert ours == theirs
    assert ours.dilation == (1, 2)
    explicit = ((2, 2), (2, 2)) if padding == 2 else padding
    assert isinstance(padding, str) or ours.padding == explicit


@pytest.mark.parametrize(
    ("equation", "lhs", "rhs", "expected"),
    [
        ("ij,jk->ik", (5, 3), (3, 4), (3, 5, 4, 1)),
        ("...i, io -> ...o", (2, 5, 3), (3, 4), (3, 10, 4, 1)),
        ("bij,bjk->bik", (2, 5, 3), (2, 3, 4), (3, 5, 4, 2)),
        ("bthk,hko->bto", (2, 5, 3, 4), (3, 4, 6), (12, 10, 6, 1)),
    ],
)
def test_einsums_are_products_by_their_labels(equation, lhs, rhs, expected):
    layer = einsum("e", equation, lhs, rhs)
    assert (layer.K, layer.P, layer.M, layer.groups) == expected
    out = jax.eval_shape(
        lambda a, b: jnp.einsum(equation, a, b),
        jax.ShapeDtypeStruct(lhs, jnp.float32),
        jax.ShapeDtypeStruct(rhs, jnp.float32),
    )
    assert layer.output_words == out.size


@pytest.mark.parametrize(("groups", "expected"), [(1, (6, 40, 8, 1)), (2, (3, 40, 4, 2))])
def test_a_convolution_of_dilated_inputs_is_transposed(groups, expected):
    out = (5, 4, 16)
    options = {"window_strides": (1,), "padding": [(1, 1)], "feature_group_count": groups}
    layer = convolution("c", (5, 6, 8), (4, 6 // groups, 2), out, lhs_dilation=(2,), **options)
    assert (layer.K, layer.P, layer.M, layer.groups) == expected


def test_convolutions_that_are_not_modelled_are_refused():
    options = {"window_strides": (1,), "padding": "VALID"}
    with pytest.raises(ValueError, match="c: convolutions grouped over the batch"):
        convolution("c", (2, 3, 8), (4, 3, 2), (1, 4, 7), batch_group_count=2, **options)

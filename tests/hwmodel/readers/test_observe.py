import jax
import jax.numpy as jnp
from flax import linen, nnx
from networks import extents

from stp_jax import hwmodel


class Attention(nnx.Module):
    """A module of one's own that holds its attention function as Flax's does."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.attention_fn = nnx.dot_product_attention

    def __call__(self, x):
        heads = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4)
        return self.attention_fn(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])


def test_attention_of_any_module_contributes_its_two_products():
    network = hwmodel.trace(Attention(nnx.Rngs(0)), jnp.zeros((3, 5, 8)))
    assert extents(network) == {
        "qkv": (8, 15, 24, 1),
        "(model).scores": (4, 5, 5, 6),
        "(model).context": (5, 5, 4, 6),
    }


class ScaledConvolution(nnx.Module):
    """A hook that holds arrays, as a quantized model's does."""

    def __init__(self):
        self.scale = nnx.Param(jnp.float32(0.5))

    def __call__(self, lhs, rhs, *args, **kwargs):
        return jax.lax.conv_general_dilated(lhs, self.scale[...] * rhs, *args, **kwargs)


def test_hooks_that_hold_arrays_are_traced_through():
    model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0)))
    model.layers[0].conv_general_dilated = nnx.data(ScaledConvolution())
    network = hwmodel.trace(model, jnp.zeros((2, 8, 8, 3)))
    assert extents(network) == {"layers.0": (27, 128, 16, 1)}
    assert isinstance(model.layers[0].conv_general_dilated, ScaledConvolution)


class Einsums(linen.Module):
    """One knows its equation, the other is given it by the call."""

    @linen.compact
    def __call__(self, x):
        x = linen.Einsum((8, 2, 4), "btd,dhk->bthk", name="split")(x)
        return linen.Einsum((2, 4, 6), name="join")(x, "...hk,hko->...o")


def test_linens_einsums_are_layers():
    network = hwmodel.trace(Einsums(), jnp.zeros((2, 5, 8)))
    assert extents(network) == {"split": (8, 10, 8, 1), "join": (8, 10, 6, 1)}


class SelfAttention(linen.MultiHeadDotProductAttention):
    @linen.compact
    def __call__(self, x):
        return super().__call__(x)


def test_attention_counts_once_where_a_method_calls_its_parents():
    network = hwmodel.trace(SelfAttention(4), jnp.zeros((2, 6, 8)))
    assert network.names == ("query", "key", "value", "(model).scores", "(model).context", "out")


def test_batched_weights_are_products_of_their_own():
    layer = linen.DenseGeneral(3, batch_dims=(0,))
    assert extents(hwmodel.trace(layer, jnp.zeros((4, 5, 6)))) == {"(model)": (6, 5, 3, 4)}

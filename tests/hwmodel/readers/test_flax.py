import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import stp_jax
from stp_jax import hwmodel


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dense = nnx.List([nnx.Linear(16, 16, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("...i,io->...o", (16, 7), (7,), rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.depthwise(self.conv(x)))
        x = self.dense[0](self.dense[0](x)).reshape(x.shape[0], -1, 16)
        return self.einsum(self.attention(x))


def extents(network):
    return {layer.name: (layer.K, layer.P, layer.M, layer.groups) for layer in network}


def test_traces_nnx_layers_in_order_of_execution():
    network = hwmodel.trace(Block(nnx.Rngs(0)), jnp.zeros((2, 8, 8, 3)))
    assert extents(network) == {
        "conv": (27, 32, 16, 1),
        "depthwise": (9, 32, 1, 16),
        "dense.0": (16, 32, 16, 1),
        "dense.0@2": (16, 32, 16, 1),
        "attention.query": (16, 32, 16, 1),
        "attention.key": (16, 32, 16, 1),
        "attention.value": (16, 32, 16, 1),
        "attention.scores": (4, 16, 16, 8),
        "attention.context": (16, 16, 4, 8),
        "attention.out": (16, 32, 16, 1),
        "einsum": (16, 32, 7, 1),
    }


def test_tracing_neither_changes_nor_runs_the_model():
    def refuse(*args, **kwargs):
        assert isinstance(args[0], jax.core.Tracer)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    model = Block(nnx.Rngs(0))
    model.conv.conv_general_dilated = refuse  # as a quantised model holds its own convolution
    mean = model.norm.mean[...]
    network = hwmodel.trace(model, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert network.names[0] == "conv"
    assert model.conv.conv_general_dilated is refuse
    assert model.norm.mean[...] is mean


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
        "model.scores": (4, 5, 5, 6),
        "model.context": (5, 5, 4, 6),
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


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(16, (3, 3), strides=2, name="conv")(x)
        x = linen.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        x = x.reshape(x.shape[0], -1, 16)
        x = linen.MultiHeadDotProductAttention(4, name="attention")(x)
        return linen.DenseGeneral(7, axis=(-2, -1), name="head")(x)


@pytest.mark.parametrize("bound", [False, True])
def test_traces_linen_layers(bound):
    model, x = LinenBlock(), jnp.zeros((2, 8, 8, 3))
    if bound:
        model = model.bind(model.init(jax.random.key(0), x))
    assert extents(hwmodel.trace(model, x)) == {
        "conv": (27, 32, 16, 1),
        "depthwise": (9, 32, 1, 16),
        "attention.query": (16, 32, 16, 1),
        "attention.key": (16, 32, 16, 1),
        "attention.value": (16, 32, 16, 1),
        "attention.scores": (4, 16, 16, 8),
        "attention.context": (16, 16, 4, 8),
        "attention.out": (16, 32, 16, 1),
        "head": (256, 2, 7, 1),
    }


def macs_of(model, *inputs):
    return hwmodel.trace(model, *(jnp.zeros(shape) for shape in inputs)).macs


@pytest.mark.parametrize("steps", [1, 6, 50])
def test_recurrent_cells_count_at_every_step(steps):
    lstm = nnx.RNN(nnx.OptimizedLSTMCell(16, 32, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert macs_of(lstm, (3, steps, 16)) == 3 * steps * 4 * 32 * (16 + 32)
    simple = linen.RNN(linen.SimpleCell(8))
    assert macs_of(simple, (3, steps, 8)) == 3 * steps * 8 * (8 + 8)


def test_layers_of_a_cell_are_named_step_by_step():
    network = hwmodel.trace(linen.RNN(linen.SimpleCell(8)), jnp.zeros((2, 3, 4)))
    first = network.names[:2]
    assert {layer.K for layer in network.layers[:2]} == {4, 8}
    assert network.names == (*first, *(f"{n}@2" for n in first), *(f"{n}@3" for n in first))


class Stacked(nnx.Module):
    """Three dense layers in one, run by a scan over their weights."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = create(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


def test_stacked_layers_count_each():
    network = hwmodel.trace(Stacked(), jnp.zeros((2, 8)))
    assert extents(network) == dict.fromkeys(("layers", "layers@2", "layers@3"), (8, 2, 8, 1))
    recorded = hwmodel.record_activations(Stacked(), jnp.ones((2, 8)))
    assert tuple(recorded) == network.names


class Mapped(nnx.Module):
    def __init__(self, rngs):
        self.shared = nnx.Linear(8, 8, rngs=rngs)
        self.copies = nnx.vmap(lambda rngs: nnx.Linear(8, 4, rngs=rngs))(rngs.split(5))

    def __call__(self, x):
        x = jax.vmap(self.shared)(x)
        return nnx.vmap(lambda layer, x: layer(x))(self.copies, x)


def test_mapped_layers_have_more_rows_or_more_copies():
    network = hwmodel.trace(Mapped(nnx.Rngs(0)), jnp.zeros((5, 3, 8)))
    assert extents(network) == {"shared": (8, 15, 8, 1), "copies": (8, 3, 4, 1)} | {
        f"copies@{n}": (8, 3, 4, 1) for n in range(2, 6)
    }


class Open(nnx.Module):
    """Products that no layer makes."""

    def __init__(self, rngs):
        self.d = nnx.Linear(8, 6, rngs=rngs)
        self.w = nnx.Param(jnp.ones((6, 4)))

    def __call__(self, x):
        x = self.d(x) @ self.w[...]
        x = jax.lax.cond(
            x.sum() > 0,
            lambda x: x @ jnp.ones((4, 5)),
            lambda x: x[:, :1] * 2.0 @ jnp.ones((1, 5)),
            x,
        )
        kernel = jnp.ones((3, 1, 2))
        return jax.lax.conv_general_dilated(
            x[..., None], kernel, (2,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )


def test_products_in_the_open_are_counted():
    network = hwmodel.trace(Open(nnx.Rngs(0)), jnp.zeros((3, 8)))
    assert extents(network) == {
        "d": (8, 3, 6, 1),
        "product": (6, 3, 4, 1),
        "product@2": (4, 3, 5, 1),
        "convolution": (3, 3 * 2, 2, 1),
    }
    assert network.layers[-1].padding == ((1, 0),)


class Looped(nnx.Module):
    def __init__(self, rngs):
        self.d = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, self.d, x)


def test_a_layer_in_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="d: runs in a while loop"):
        hwmodel.trace(Looped(nnx.Rngs(0)), jnp.zeros((3, 8)))


class Masked(linen.Module):
    """Its first argument is not an array."""

    @linen.compact
    def __call__(self, training, inputs):
        x = linen.Dense(4, name="d")(inputs["x"])
        return linen.Dropout(0.5, deterministic=not training)(x)


def test_linen_modules_may_take_anything():
    network = hwmodel.trace(Masked(), False, {"x": jnp.zeros((2, 3))})
    assert extents(network) == {"d": (3, 2, 4, 1)}


def test_a_quantized_linen_model_has_its_modules_layers():
    policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    model, x = LinenBlock(), jnp.zeros((2, 8, 8, 3))
    quantized = hwmodel.trace(stp_jax.quantize(model, policy), x)
    assert quantized.layers == hwmodel.trace(model, x).layers


def test_a_quantized_model_has_no_products_of_its_quantizers():
    model, x = Block(nnx.Rngs(0)), jnp.zeros((2, 8, 8, 3))
    rules = [stp_jax.Rule(path=".*", budget=6, activations="dynamic")]
    quantized = hwmodel.trace(stp_jax.quantize(model, stp_jax.Policy(rules)), x)
    assert quantized.layers == hwmodel.trace(model, x).layers


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


def test_what_cannot_be_traced_is_said():
    with pytest.raises(TypeError, match=r"expected an nnx\.Module"):
        hwmodel.trace(lambda x: x, jnp.zeros(3))
    with pytest.raises(ValueError, match="transposed"):
        hwmodel.trace(nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0)), jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="no convolution"):
        hwmodel.trace(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jnp.zeros((1, 4)))

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from networks import extents

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


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 8, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class LinenTied(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(12, 8, dtype=jnp.bfloat16, name="embed")
        return embed.attend(embed(tokens))


class TiedInLoops(Tied):
    def __call__(self, tokens):
        def step(x, _):
            return x, jax.lax.cond(x.sum() > 0, jax.jit(self.embed.attend), self.embed.attend, x)

        x = self.embed(tokens)
        return jax.lax.scan(step, x, None, length=2)[1], jax.vmap(self.embed.attend)(x)


@pytest.mark.parametrize("model", [Tied(nnx.Rngs(0)), LinenTied()], ids=["nnx", "linen"])
def test_an_embedding_is_a_layer_where_it_is_multiplied(model):
    tokens = jnp.zeros((2, 5), jnp.int32)
    network = hwmodel.trace(model, tokens)
    assert extents(network) == {"embed": (8, 10, 12, 1)}
    assert network.layers[0].kind == "dense"
    rule = stp_jax.Rule(path=".*", budget=6, activations="dynamic", embeddings=True)
    quantized = hwmodel.trace(stp_jax.quantize(model, stp_jax.Policy([rule])), tokens)
    assert quantized.layers == network.layers


def test_an_abstract_model_with_a_quantized_embedding_is_traced():
    rule = stp_jax.Rule(path=".*", budget=6, activations="dynamic", embeddings=True)
    policy, tokens = stp_jax.Policy([rule]), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    abstract = nnx.eval_shape(lambda: stp_jax.quantize(Tied(nnx.Rngs(0)), policy))
    assert hwmodel.trace(abstract, tokens).names == ("embed",)


def test_an_embedding_is_named_inside_of_loops_branches_and_jit():
    network = hwmodel.trace(TiedInLoops(nnx.Rngs(0)), jnp.zeros((2, 5), jnp.int32))
    layer = (8, 10, 12, 1)
    assert extents(network) == {"embed": layer, "embed@2": layer, "embed@3": layer}


def test_what_cannot_be_traced_is_said():
    with pytest.raises(TypeError, match=r"expected an nnx\.Module"):
        hwmodel.trace(lambda x: x, jnp.zeros(3))
    with pytest.raises(ValueError, match="no convolution"):
        hwmodel.trace(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jnp.zeros((1, 4)))


class UpNnx(nnx.Module):
    """What a decoder of images does: a convolution, and one transposed after it."""

    def __init__(self, transpose_kernel, rngs):
        self.down = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        options = {"strides": 2, "transpose_kernel": transpose_kernel, "rngs": rngs}
        self.up = nnx.ConvTranspose(8, 4, (2, 3), **options)

    def __call__(self, x):
        return self.up(self.down(x))


class UpLinen(linen.Module):
    transpose_kernel: bool

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3, 3), strides=2, name="down")(x)
        options = {"strides": (2, 2), "transpose_kernel": self.transpose_kernel, "name": "up"}
        return linen.ConvTranspose(4, (2, 3), **options)(x)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("make", [lambda t: UpNnx(t, nnx.Rngs(0)), UpLinen], ids=["nnx", "linen"])
def test_a_transposed_convolution_multiplies_every_input_pixel_by_its_kernel(
    make, transpose_kernel
):
    network = hwmodel.trace(make(transpose_kernel), jnp.zeros((5, 8, 8, 3)))
    up = network.layers[1]
    assert (up.name, up.kind) == ("up", "dense")
    assert (up.P, up.K, up.M) == (5 * 4 * 4, 8, 4 * 2 * 3)
    assert network.links[1].inputs == (("down", 1.0),)


def test_a_transposed_convolution_of_stride_1_is_a_convolution():
    model = nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0))
    (layer,) = hwmodel.trace(model, jnp.zeros((1, 8, 8, 3)))
    assert (layer.name, layer.kind) == ("(model)", "conv")
    assert layer.macs == 8 * 8 * 9 * 3 * 4


def test_inputs_of_transposed_convolutions_are_recorded():
    model, x = UpNnx(False, nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    found = hwmodel.record_activations(model, x)
    assert found["up"].shape == (1, 4, 4, 8)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from stp_jax import hwmodel
from stp_jax.hooks import LinenModel
from stp_jax.hwmodel.operands import layer_patches, layer_weights


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


class Attention(nnx.Module):
    """A module of one's own that holds its attention function as Flax's does."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(8, 24, rngs=rngs)
        self.attention_fn = nnx.dot_product_attention

    def __call__(self, x):
        heads = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4)
        return self.attention_fn(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])


def test_recorded_activations_are_what_the_layers_see():
    model, x = Block(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    recorded = hwmodel.record_activations(model, x)
    network = hwmodel.trace(model, x)
    assert set(recorded) == set(network.names)
    seen = model.depthwise(model.conv(x))  # before the norm, whose statistics need not be known
    signed = np.rint(np.asarray(x) * (127 / np.abs(x).max()))  # 8 bits with the sign
    np.testing.assert_array_equal(recorded["conv"], signed)
    positive = hwmodel.record_activations(model, jnp.abs(x))["conv"]
    assert (positive.min() >= 0, positive.max()) == (True, 255)
    inside = np.asarray(model.conv(x))
    np.testing.assert_allclose(
        recorded["depthwise"] / 127, inside / np.abs(inside).max(), atol=0.5 / 127 + 1e-6
    )
    assert recorded["dense.0"].shape == seen.shape
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitPragmatic())
    convolutions = hwmodel.Network(network.layers[:2])
    given = {name: recorded[name] for name in convolutions.names}
    assert (hwmodel.evaluate(convolutions, array, activations=given).cycles > 0).all()


class Mapped(nnx.Module):
    def __init__(self, rngs):
        self.shared = nnx.Linear(8, 8, rngs=rngs)
        self.copies = nnx.vmap(lambda rngs: nnx.Linear(8, 4, rngs=rngs))(rngs.split(5))

    def __call__(self, x):
        x = jax.vmap(self.shared)(x)
        return nnx.vmap(lambda layer, x: layer(x))(self.copies, x)


def test_values_under_vmap_cannot_be_recorded():
    with pytest.raises(ValueError, match=r"runs under jax\.vmap"):
        hwmodel.record_activations(Mapped(nnx.Rngs(0)), jnp.zeros((5, 3, 8)))


def test_recorded_products_are_those_of_attention():
    model, x = Attention(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 5, 8))
    network = hwmodel.trace(model, x)
    activations, weights = hwmodel.record_operands(model, x)
    assert set(weights) == {"(model).scores", "(model).context"}
    scores, context = network.layers[1:]
    heads = np.moveaxis(np.asarray(model.qkv(x)).reshape(3, 5, 3, 2, 4), 2, 0)
    query, key, value = heads.swapaxes(2, 3).reshape(3, 6, 5, 4)  # products first
    made = [
        np.einsum(
            "gkp,gkm->gpm",
            layer_patches(layer, activations[layer.name], 8),
            layer_weights(layer, weights[layer.name], 8),
        )
        for layer in (scores, context)
    ]
    product = query @ key.swapaxes(1, 2)
    np.testing.assert_allclose(
        made[0] / np.abs(made[0]).max(), product / np.abs(product).max(), atol=0.02
    )
    expected = np.asarray(jax.nn.softmax(product / 2, axis=-1)) @ value
    np.testing.assert_allclose(
        made[1] / np.abs(made[1]).max(), expected / np.abs(expected).max(), atol=0.02
    )
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitPragmatic())
    assert (hwmodel.evaluate(network, array, activations=activations).cycles > 0).all()


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(8, (3, 3), strides=2, padding="CIRCULAR", name="conv")(x)
        x = linen.MultiHeadDotProductAttention(2, name="attention")(x.reshape(len(x), -1, 8))
        return linen.Einsum((8, 3), "btd,do->bto", name="head")(x)


def test_linen_modules_are_recorded_with_their_variables():
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 3))
    module = LinenBlock()
    variables = module.init(jax.random.key(0), x)
    network = hwmodel.trace(module, x)
    activations, weights = hwmodel.record_operands(module.bind(variables), x)
    assert set(activations) == set(network.names)
    assert set(weights) == {"attention.scores", "attention.context"}
    same, _ = hwmodel.record_operands(LinenModel(module, variables), x)
    for name, recorded in activations.items():
        np.testing.assert_array_equal(same[name], recorded)
    padded = np.pad(np.asarray(x), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="wrap")
    np.testing.assert_array_equal(
        activations["conv"], np.rint(padded * (127 / np.abs(padded).max()))
    )
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitPragmatic())
    assert (hwmodel.evaluate(network, array, activations=activations).cycles > 0).all()


def test_linen_and_nnx_layers_record_alike():
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    theirs = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    variables = {"params": {"kernel": theirs.kernel[...], "bias": theirs.bias[...]}}
    ours = hwmodel.record_activations(linen.Dense(3).bind(variables), x)
    np.testing.assert_array_equal(ours["(model)"], hwmodel.record_activations(theirs, x)["(model)"])


def test_a_model_without_parameters_cannot_be_recorded():
    with pytest.raises(TypeError, match="bind the module to its variables"):
        hwmodel.record_operands(LinenBlock(), jnp.zeros((2, 6, 6, 3)))
    with pytest.raises(TypeError, match=r"expected an nnx\.Module or a linen\.Module"):
        hwmodel.record_operands(jnp.sin, jnp.zeros(3))


def test_the_query_of_a_tied_embedding_is_its_input():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(12, 8, rngs=nnx.Rngs(0))

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    model, tokens = Tied(), jnp.arange(6).reshape(2, 3)
    (name, query), *others = hwmodel.record_activations(model, tokens).items()
    assert (name, others) == ("embed", [])
    np.testing.assert_allclose(
        query / np.abs(query).max(),
        model.embed(tokens) / jnp.abs(model.embed(tokens)).max(),
        atol=0.005,
    )

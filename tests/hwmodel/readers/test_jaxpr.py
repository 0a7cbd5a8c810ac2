import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from networks import extents

from stp_jax import hwmodel


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

"""The integer network from a packed file, and on the Verilog of the array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule, export
from stp_jax.hwmodel import rtl
from stp_jax.models.layers import batch_norm, conv, linear
from stp_jax.models.resnet import BasicBlock
from stp_jax.quant.integer_steps import Product

X = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))


class Net(nnx.Module):
    """A stem, a residual block with a projection, and a head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = conv(2, 4, 3, rngs=rngs)
        self.norm = batch_norm(4, rngs=rngs)
        self.block = BasicBlock(4, 6, stride=2, projection=True, rngs=rngs)
        self.head = linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.block(nnx.relu(self.norm(self.conv(x))))
        return self.head(jnp.mean(x, axis=(1, 2)))


def folded():
    return stp_jax.fold_batch_norm(Net(), X)


@pytest.fixture(scope="module")
def model():
    rule = Rule(path=".*", group_size=4, budget=4, power_of_two_scales=True)
    model = stp_jax.quantize(folded(), Policy([rule]))
    model.eval()
    stp_jax.calibrate(model, [X])
    return model


def test_a_packed_file_gives_the_same_network(model, tmp_path):
    path = tmp_path / "model.safetensors"
    export.save_packed(model, path)
    again = export.load_packed(nnx.eval_shape(folded), path)
    networks = [stp_jax.integer_network(m, X, arithmetic="shift_add") for m in (model, again)]
    assert str(networks[0]) == str(networks[1])
    q = networks[0].quantize(X)
    np.testing.assert_array_equal(*(jax.jit(network)(q) for network in networks))


@pytest.mark.skipif(
    not rtl.icarus_available(), reason="iverilog and vvp (Icarus Verilog) are not on PATH"
)
def test_the_array_gives_every_integer_of_the_whole_network(model):
    """Several folds of rows and of columns: 2 x 3 PEs of 4 inputs for up to 9 groups, 16 pixels."""
    network = stp_jax.integer_network(model, X, arithmetic="shift_add")
    q = network.quantize(X)[0]
    expected = jax.jit(network.run)(q[None])
    found, observed = export.simulate_network(network, q, rows=2, cols=3)
    for step, a, b in zip(network.steps, expected[1:], found[1:], strict=True):
        np.testing.assert_array_equal(a, b, err_msg=step.layer)
    layers = [step.layer for step in network.steps if isinstance(step, Product)]
    assert list(observed) == layers and len(layers) == 5
    (job,) = observed["block.conv2"]
    assert job.psum_reads > 0  # partial sums were read again: more than one fold of rows


@pytest.mark.slow  # its fixture is
def test_one_example_is_asked_for(model):
    network = stp_jax.integer_network(model, X)
    with pytest.raises(ValueError, match="expected one example of shape"):
        export.simulate_network(network, network.quantize(X), rows=2, cols=2)

"""Folding BatchNorm changes no output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule
from stp_jax.models.mobilenet import InvertedResidual
from stp_jax.models.resnet import BasicBlock

X = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))


def with_statistics(model):
    """The model with BatchNorms that are no identities, in evaluation mode."""
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name, low, high in (("mean", -1, 1), ("var", 0.5, 2), ("bias", -1, 1)):
                if (variable := getattr(module, name)) is not None:
                    variable[...] = jnp.asarray(rng.uniform(low, high, variable.shape), jnp.float32)
    model.eval()
    return model


class Bare(nnx.Module):
    """A dense layer with a bias, and a BatchNorm without parameters of its own."""

    def __init__(self):
        self.dense = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.dense.bias[...] = jnp.arange(6.0)
        self.norm = nnx.BatchNorm(6, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dense(x))


def residual():
    return BasicBlock(8, 12, stride=2, projection=True, rngs=nnx.Rngs(0))


def inverted():
    return InvertedResidual(8, 8, stride=1, expansion=2, dtype=None, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [residual, inverted, Bare])
def test_the_folded_model_is_equal_and_has_no_batch_norm(make):
    model = with_statistics(make())
    folded = stp_jax.fold_batch_norm(model, X)
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(folded))
    np.testing.assert_allclose(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_an_abstract_model_is_folded_to_the_same_structure():
    folded = stp_jax.fold_batch_norm(residual(), X)
    abstract = nnx.eval_shape(lambda: stp_jax.fold_batch_norm(residual(), X))
    assert jax.tree.map(jnp.shape, nnx.state(folded)) == jax.tree.map(
        jnp.shape, nnx.state(abstract)
    )


class Twice(nnx.Module):
    """One layer before two BatchNorms, or two layers before one."""

    def __init__(self, layers, norms):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(layers)])
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=nnx.Rngs(0)) for _ in range(norms)])

    def __call__(self, x):
        return sum(norm(layer(x)) for layer in self.layers for norm in self.norms)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="goes into the BatchNorms"):
        stp_jax.fold_batch_norm(Twice(1, 2), X)
    with pytest.raises(ValueError, match="follows several layers"):
        stp_jax.fold_batch_norm(Twice(2, 1), X)
    with pytest.raises(ValueError, match="no BatchNorm takes the output"):
        stp_jax.fold_batch_norm(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), X)
    with pytest.raises(TypeError, match="fold_batch_norm takes an nnx"):
        stp_jax.fold_batch_norm(nn.Dense(4), X)
    quantized = stp_jax.quantize(Bare(), Policy([Rule(path=".*")]))
    with pytest.raises(ValueError, match=r"before stp_jax\.quantize"):
        stp_jax.fold_batch_norm(quantized, X)

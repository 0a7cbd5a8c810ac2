"""Operands of measurements: budgets kept, a network's own groups found again."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from benchmarks.rtl.operands import of_network, synthetic
from stp_jax import hwmodel, terms
from stp_jax.export import load_integers, save_packed


def test_synthetic_operands_keep_every_budget():
    operands = synthetic((8, 3), folds=2, filters=16, seed=1)
    for budget, projected in operands.by_budget.items():
        held = np.asarray(terms.count(projected.weights)).sum(axis=-1)
        assert held.max() <= budget
    assert (operands.dense.activations >= 0).all()
    assert np.abs(operands.dense.weights).max() <= 127


class _Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.conv(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    model = stp_jax.quantize(_Network(), policy)
    save_packed(model, folder / "model.safetensors")
    images = jnp.asarray(np.random.default_rng(0).random((2, 6, 6, 8)), jnp.float32)
    np.savez(folder / "inputs.npz", **hwmodel.record_activations(model, images))
    return model, folder / "model.safetensors", folder / "inputs.npz"


def test_integers_are_read_without_the_model(files):
    model, packed, _ = files
    expected = stp_jax.integer_weights(model)
    found = load_integers(packed)
    assert set(found) == set(expected)
    for name, kernel in expected.items():
        np.testing.assert_array_equal(found[name], kernel)


def test_a_networks_groups_and_activations_are_its_own(files):
    _, packed, recorded = files
    operands = of_network(packed, recorded, (6, 3), folds=6, filters=16, seed=0)
    groups = {
        tuple(group)
        for kernel in load_integers(packed).values()
        for group in kernel.reshape(-1, 8, 16).transpose(0, 2, 1).reshape(-1, 8)
    }
    taken = operands.by_budget[6].weights
    assert all(tuple(group) in groups for fold in taken for group in fold)
    np.testing.assert_array_equal(taken, operands.dense.weights)  # the file's own budget
    assert np.asarray(terms.count(operands.by_budget[3].weights)).sum(-1).max() <= 3
    assert operands.dense.activations.min() >= 0 and operands.dense.activations.max() <= 127


def test_layers_that_do_not_fit_are_an_error(files):
    _, packed, recorded = files
    with pytest.raises(ValueError, match="64 filters"):
        of_network(packed, recorded, (8,), folds=1, filters=64, seed=0)

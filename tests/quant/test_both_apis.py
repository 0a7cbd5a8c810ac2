"""Every function of `stp_jax` does the same to an NNX model and to its Linen twin."""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import stp_jax
from stp_jax import hooks

X = 1.0 + jax.random.normal(jax.random.key(1), (6, 5, 5, 8))
BATCHES = [X[:3], X[3:]]
POLICY = stp_jax.Policy(
    [stp_jax.Rule(path="head", group_size=4), stp_jax.Rule(path=".*", budget=6, group_size=4)]
)


class Linen(nn.Module):
    """conv → BatchNorm → relu → conv with channel groups → mean → dense → dense."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2, name="grouped")(x))
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(10, name="fc")(x.mean((1, 2)))))


class NNX(nnx.Module):
    """The same network."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.grouped = nnx.Conv(8, 6, (2, 2), feature_group_count=2, rngs=rngs)
        self.fc = nnx.Linear(6, 10, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.grouped(x))
        return self.head(nnx.relu(self.fc(x.mean((1, 2)))))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


def build():
    """A calibrated NNX model and its Linen twin with variables of the same values."""
    model = NNX(nnx.Rngs(0))
    model.eval()
    quantized = stp_jax.quantize(Linen(), POLICY)
    variables = jax.jit(quantized.init)(jax.random.key(0), X)
    for path, name in (("norm", "mean"), ("norm", "var")):
        variables["batch_stats"][path][name] = getattr(getattr(model, path), name)[...]
    for path, values in variables["params"].items():
        for name in values:
            values[name] = getattr(getattr(model, path), name)[...]
    twin = quantized.bind(variables)
    model = stp_jax.quantize(model, POLICY)
    for each in (model, twin):
        stp_jax.search_weight_scales(each)  # the twin's are those of the initial kernels
        stp_jax.calibrate(each, BATCHES)
    return model, twin


@pytest.fixture(scope="module", name="calibrated")
def make_calibrated():
    with jax.numpy_rank_promotion("allow"):
        return build()


@pytest.fixture(name="twins")
def make_twins(calibrated):
    model, twin = calibrated
    return nnx.clone(model), copy.copy(twin)


def same(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for mine, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=atol)


def state(model):
    """What the quantizers store, by layer."""
    return {
        path: (q.kernel, q.stored_scale, q.stored_input_scale, q.budget)
        for path, q in stp_jax.quantized_layers(model).items()
    }


def call(model):
    return jax.jit(lambda x: model(x))(X)  # operation by operation it compiles some fifty programs


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


def set_uniform(model):
    stp_jax.set_budgets(model, 3)
    return stp_jax.budgets(model)


def corrected(model):
    stp_jax.set_budgets(model, 4)
    return stp_jax.correct_bias(model, BATCHES), call(model)


def compensated(model):
    budgets = dict.fromkeys(stp_jax.budgets(model), 4)
    return stp_jax.compensate(model, BATCHES, budgets), stp_jax.integer_weights(model)


def relaxed(model):
    stp_jax.relax_budgets(model)
    found = stp_jax.relaxed_budgets(model)
    out = call(model)
    stp_jax.set_budgets(model, 5)
    return found, out, stp_jax.budgets(model)


BY_FILTER = {"conv": np.arange(1, 9), "grouped": np.arange(2, 14, 2), "fc": np.arange(10)}


def by_filter(model):
    stp_jax.set_budgets(model, BY_FILTER)
    stp_jax.search_weight_scales(model)
    return stp_jax.budgets(model), stp_jax.integer_weights(model), call(model)


def relaxed_by_filter(model):
    stp_jax.set_budgets(model, BY_FILTER)
    return relaxed(model)


def corrected_by_filter(model):
    stp_jax.set_budgets(model, BY_FILTER)
    return stp_jax.correct_bias(model, BATCHES), call(model)


def compensated_by_filter(model):
    return stp_jax.compensate(model, BATCHES, BY_FILTER), stp_jax.integer_weights(model)


FUNCTIONS = {
    "calibrate": state,
    "call": call,
    "set_budgets": set_uniform,
    "integer_weights": stp_jax.integer_weights,
    "group_counts": stp_jax.group_counts,
    "error_curves": stp_jax.error_curves,
    "squared_gradients": lambda model: stp_jax.squared_gradients(model, loss, BATCHES),
    "allocate": lambda model: stp_jax.allocate(model, 1.0),
    "output_divergences": lambda model: stp_jax.output_divergences(model, BATCHES, 2),
    "output_divergences, running": lambda model: stp_jax.output_divergences(
        model, BATCHES, 2, batch_statistics=False
    ),
    "allocate_by_divergence": lambda model: stp_jax.allocate_by_divergence(model, 0.75, BATCHES),
    "relax_budgets": relaxed,
    "error_curves by filter": lambda model: stp_jax.error_curves(model, by="filter"),
    "allocate by filter": lambda model: stp_jax.allocate(model, 1.0, by="filter"),
    "set_budgets by filter": by_filter,
    "relax_budgets by filter": relaxed_by_filter,
    "correct_bias by filter": corrected_by_filter,
    "compensate by filter": compensated_by_filter,
    "integer_model by filter": lambda model: (by_filter(model), call(stp_jax.integer_model(model))),
    "correct_bias": corrected,
    "compensate": compensated,
    "integer_model": lambda model: call(stp_jax.integer_model(model)),
    "integer_model, shift_add": lambda model: call(
        stp_jax.integer_model(model, arithmetic="shift_add")
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_give_the_same(twins, name):
    ours, theirs = (FUNCTIONS[name](model) for model in twins)
    same(ours, theirs, rtol=1e-4, atol=1e-5)


def test_projected_parameters_are_the_same(twins):
    ours, theirs = (stp_jax.project_params(model, {"conv": 2}) for model in twins)
    for path in ("conv", "grouped", "fc", "head"):
        np.testing.assert_allclose(
            ours[path]["kernel"][...], theirs[path]["kernel"], rtol=1e-5, atol=1e-7
        )


def test_guidance_pulls_linen_parameters_to_the_same_targets(twins):
    model, twin = twins
    params, _ = hooks.trainable(twin)
    tx = stp_jax.guidance(twin, 1.0, budgets={"conv": 2})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    goal = stp_jax.project_params(model, {"conv": 2})["conv"]["kernel"][...]
    np.testing.assert_allclose(moved["conv"]["kernel"], goal, rtol=1e-5, atol=1e-7)


def test_the_bound_model_s_variables_change_and_those_given_stay(calibrated):
    twin = copy.copy(calibrated[1])
    given = twin.variables
    before = jax.tree.map(np.asarray, given)
    stp_jax.set_budgets(twin, 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, given))
    assert stp_jax.budgets(twin) == {"conv": 2, "grouped": 2, "fc": 2}
    assert twin.variables["stp"]["fc"]["budget"].shape == (1, 1)


def test_relaxed_linen_budgets_are_trained_with_the_scales(twins):
    _, twin = twins
    stp_jax.relax_budgets(twin)
    variables = twin.variables

    def value(learned):
        return jnp.sum(twin.stp.apply({**variables, "stp_params": learned}, X) ** 2)

    gradients = jax.jit(jax.grad(value))(variables["stp_params"])
    assert jnp.abs(gradients["fc"]["relaxed_budget"]).max() > 0
    stp_jax.set_budgets(twin, 5)
    assert "relaxed_budget" not in twin.variables["stp_params"]["fc"]


def test_a_restored_model_is_bound_with_an_input(calibrated):
    variables = calibrated[1].variables
    fresh = stp_jax.quantize(Linen(), POLICY)
    with pytest.raises(ValueError, match=r"model\.bind\(variables, x\) with an input"):
        fresh.bind(variables)
    bound = fresh.bind(variables, X)
    assert stp_jax.budgets(bound) == stp_jax.budgets(calibrated[1])


def test_a_later_calibration_replaces_an_earlier_one(twins):
    for model in twins:
        layers = stp_jax.quantized_layers(model)
        first = {path: np.asarray(layer.stored_input_scale) for path, layer in layers.items()}
        stp_jax.calibrate(model, [50 * X])
        layers = stp_jax.quantized_layers(model)
        assert all(np.all(layer.stored_input_scale > first[path]) for path, layer in layers.items())
        stp_jax.calibrate(model, BATCHES)
        for path, layer in stp_jax.quantized_layers(model).items():
            np.testing.assert_allclose(layer.stored_input_scale, first[path], rtol=1e-6)
        with pytest.raises(ValueError, match="NaN"):
            stp_jax.calibrate(model, [X, X * jnp.nan])
        for path, layer in stp_jax.quantized_layers(model).items():
            np.testing.assert_allclose(layer.stored_input_scale, first[path], rtol=1e-6)

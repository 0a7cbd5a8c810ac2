"""Budgets by filter in a model: one shape stored, each filter on its own, a lower total error."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule
from stp_jax.terms import GroupLayout, count

X = jax.random.normal(jax.random.key(1), (3, 6, 6, 16))
POLICY = Policy([Rule(path=".*", budget=8, activations="none")])


class Net(nnx.Module):
    """Every kind of kernel: convolution, depthwise, transposed, dense with two output axes."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(16, 12, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(12, 12, (3, 3), feature_group_count=12, rngs=rngs)
        self.transposed = nnx.ConvTranspose(12, 10, (2, 2), transpose_kernel=True, rngs=rngs)
        self.heads = nnx.LinearGeneral(10, (2, 4), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.depthwise(nnx.relu(self.conv(x))))
        return self.heads(nnx.relu(self.transposed(x)).mean((1, 2)))


FILTERS = {"conv": 12, "depthwise": 12, "transposed": 10, "heads": 8}
# The axes of each kernel along which groups lie, and its filters' in order.
AXES = {"conv": (2,), "depthwise": (0, 1), "transposed": (3,), "heads": (0,)}


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(name="model")
def make_model():
    return stp_jax.quantize(Net(nnx.Rngs(0)), POLICY)


def held(model, path):
    """The most terms that a group of each filter holds, ``[filters]``."""
    integers = stp_jax.integer_weights(model)[path]
    layout = GroupLayout(8, AXES[path])
    sums = np.asarray(layout.sums(np.asarray(count(integers))))
    quantized = stp_jax.quantized_layers(model)[path]
    kept = [a for a in range(integers.ndim) if a not in quantized.format.axes.scale]
    merged = len(AXES[path]) - 1
    kept = [a if a < AXES[path][0] else a - merged for a in kept]
    return sums.max(axis=tuple(a for a in range(sums.ndim) if a not in kept)).reshape(-1)


def test_each_filter_keeps_its_own_budget(model):
    rng = np.random.default_rng(0)
    budgets = {path: rng.integers(0, 7, n) for path, n in FILTERS.items()}
    stp_jax.set_budgets(model, budgets)
    for path, wanted in budgets.items():
        np.testing.assert_array_equal(held(model, path), wanted)
        np.testing.assert_array_equal(stp_jax.budgets(model)[path], wanted)
    assert stp_jax.mean_budgets(stp_jax.budgets(model))["conv"] == budgets["conv"].mean()


def test_equal_budgets_by_filter_compute_what_one_by_layer_does(model):
    for budget in (3, 8, 32):
        stp_jax.set_budgets(model, budget)
        one, integers = model(X), stp_jax.integer_weights(model)
        stp_jax.set_budgets(model, {path: np.full(n, budget) for path, n in FILTERS.items()})
        chex.assert_trees_all_equal(stp_jax.integer_weights(model), integers)
        chex.assert_trees_all_equal(model(X), one)


def test_curves_by_filter_sum_to_the_layer_s_and_are_the_errors():
    rule = Rule(path=".*", budget=8, activations="none", weight_scale="max")
    model = stp_jax.quantize(Net(nnx.Rngs(0)), Policy([rule]))
    curves = stp_jax.error_curves(model, by="filter")
    whole = stp_jax.error_curves(model)
    for path, filters in FILTERS.items():
        assert curves[path].shape == (filters, 33)
        np.testing.assert_allclose(curves[path].sum(0), whole[path], rtol=1e-4, atol=1e-6)
    layer = stp_jax.quantized_layers(model)["transposed"]  # [2, 2, filters, inputs]
    error = (np.asarray(layer.projected(5)) - np.asarray(layer.kernel)) ** 2
    np.testing.assert_allclose(curves["transposed"][:, 5], error.sum((0, 1, 3)), rtol=1e-3)


@pytest.mark.parametrize("total", [0.4, 0.75])
def test_allocation_by_filter_has_the_lower_error_at_the_same_total(model, total):
    costs = stp_jax.term_costs(model)
    curves = stp_jax.error_curves(model, by="filter")

    def spent_and_error(budgets):
        spent = sum(cost * np.mean(budgets[path]) for path, cost in costs.items())
        rows = {path: np.broadcast_to(k, len(curves[path])) for path, k in budgets.items()}
        return spent, sum(curves[p][np.arange(len(k)), k].sum() for p, k in rows.items())

    by_layer, by_filter = (stp_jax.allocate(model, total, by=by) for by in ("layer", "filter"))
    for budgets in (by_layer, by_filter):
        assert spent_and_error(budgets)[0] <= total * (1 + 1e-9)
        assert min(np.min(k) for k in budgets.values()) >= 1
    assert spent_and_error(by_filter)[1] < spent_and_error(by_layer)[1]
    with pytest.raises(ValueError, match="by must be one of layer, filter"):
        stp_jax.allocate(model, total, by="group")


def test_one_compilation_serves_all_budgets_by_filter(model):
    stp_jax.set_budgets(model, {"conv": np.full(12, 3)})

    @nnx.jit
    @chex.assert_max_traces(1)
    def run(model, x):
        return model(x)

    before = run(model, X)
    stp_jax.set_budgets(model, {"conv": np.arange(12)})
    assert jnp.abs(run(model, X) - before).max() > 0


def test_a_schedule_of_budgets_guides_each_filter(model):
    goal = {"conv": np.arange(1, 13)}
    schedule = stp_jax.terms.budget_schedule(32, goal["conv"], 4)
    tx = stp_jax.guidance(model, 1.0, budgets=lambda step: {"conv": schedule(step)})
    params = nnx.state(model, nnx.Param)
    state = tx.init(params)._replace(step=jnp.int32(4))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    moved = params["conv"]["kernel"][...] + updates["conv"]["kernel"][...]
    wanted = stp_jax.project_params(model, goal)["conv"]["kernel"][...]
    np.testing.assert_allclose(moved, wanted, rtol=1e-5, atol=1e-6)


def test_a_budget_is_stored_as_a_scalar_or_beside_the_kernel(model):
    """The shapes that checkpoints hold: () or the weight scale's, which broadcast to the kernel."""
    stored = lambda: model.conv.promote_dtype.budget[...].shape  # noqa: E731
    assert stored() == ()
    stp_jax.set_budgets(model, {"conv": np.arange(12)})
    assert stored() == model.conv.promote_dtype.weight_scale[...].shape == (1, 1, 1, 12)
    stp_jax.set_budgets(model, {"conv": np.arange(12).reshape(1, 1, 1, 12)})
    stp_jax.relax_budgets(model)
    assert stored() == (1, 1, 1, 12)
    assert stp_jax.relaxed_budgets(model)["conv"].shape == (12,)
    stp_jax.set_budgets(model, {"conv": 4})
    assert stored() == ()


class Stack(nn.Module):
    """Three dense layers under scan, stacked along an axis."""

    axis: int

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _=None):
                return nn.Dense(8, use_bias=False)(x), None

        axes = {"params": self.axis}
        scan = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(name="block")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_linen_layers_have_budgets_by_filter(axis):
    quantized, x = stp_jax.quantize(Stack(axis), POLICY), X[0, 0, :, :8]
    model = quantized.bind(jax.jit(quantized.init)(jax.random.key(0), x))
    (path,) = stp_jax.budgets(model)
    wanted = np.random.default_rng(0).integers(1, 7, (3, 8))
    stp_jax.set_budgets(model, {path: wanted})
    np.testing.assert_array_equal(stp_jax.budgets(model)[path], wanted)
    integers = np.moveaxis(stp_jax.integer_weights(model)[path], axis, 0)
    np.testing.assert_array_equal(np.asarray(count(integers)).sum(1), wanted)
    by_hand = x
    kernels = stp_jax.project_params(model)["block"]["Dense_0"]["kernel"]
    for kernel in np.moveaxis(np.asarray(kernels), axis, 0):
        by_hand = by_hand @ kernel
    np.testing.assert_allclose(model(x), by_hand, rtol=1e-4, atol=1e-5)
    stp_jax.set_budgets(model, {path: [2, 4, 6]})
    assert stp_jax.budgets(model) == {path: [2, 4, 6]}


def test_stacked_nnx_layers_have_budgets_by_filter():
    make = lambda rngs: stp_jax.quantize(nnx.Linear(8, 6, rngs=rngs), POLICY)  # noqa: E731
    model = nnx.vmap(make)(nnx.Rngs(0).split(3))
    wanted = np.random.default_rng(0).integers(1, 7, (3, 6))
    stp_jax.set_budgets(model, {"": wanted})
    np.testing.assert_array_equal(stp_jax.budgets(model)[""], wanted)
    integers = stp_jax.integer_weights(model)[""]
    np.testing.assert_array_equal(np.asarray(count(integers)).sum(1), wanted)


def test_mistakes_are_named(model):
    with pytest.raises(
        ValueError, match=r"'conv': budgets of shape \(3,\) for 12 filters: give one"
    ):
        stp_jax.set_budgets(model, {"conv": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"'conv': budget 40 is outside \[0, 32\]"):
        stp_jax.set_budgets(model, {"conv": np.full(12, 40)})
    with pytest.raises(TypeError, match="budgets are integers"):
        stp_jax.set_budgets(model, {"conv": np.full(12, 0.5)})
    assert stp_jax.budgets(model)["conv"] == 8


def test_terms_per_weight_are_those_of_the_integers_over_the_chosen_layers():
    model = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    rules = [Rule(path=r"layers\.1"), Rule(path=".*", budget=4)]
    model = stp_jax.quantize(model, Policy(rules))
    counts = {k: count(v) for k, v in stp_jax.integer_weights(model).items()}
    held = stp_jax.weight_terms(model)
    assert held.keys() == counts.keys()
    for path, expected in counts.items():
        np.testing.assert_array_equal(held[path], expected)
    first, second = (int(counts[path].sum()) for path in ("layers.0", "layers.1"))
    assert stp_jax.terms_per_weight(model) == first / 128
    assert stp_jax.terms_per_weight(model, counts) == (first + second) / 160
    with pytest.raises(ValueError, match=r"layers\.2"):
        stp_jax.terms_per_weight(model, ["layers.2"])
    with pytest.raises(ValueError, match="no layer of the model has a budget"):
        stp_jax.terms_per_weight(model, [])

"""STP on NNX models as Flax's documentation writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import stp_jax
from stp_jax import Policy, Rule
from stp_jax.quant.nnx import ActivationScale, WeightScale
from stp_jax.quant.policy import UnmatchedRuleError
from stp_jax.terms import count

X = jax.random.normal(jax.random.key(1), (2, 5, 6, 8))


def policy(**rule):
    return Policy([Rule(path=".*", **rule)])


def rngs():
    return nnx.Rngs(0)


class Block(nnx.Module):
    """A transformer block (Flax's documentation, "Transformer" examples), pre-normalised."""

    def __init__(self, rngs, dtype=None):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, decode=False, dtype=dtype, rngs=rngs
        )
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(16, 8, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


@nnx.jit
def call(model, x):
    return model(x)


TOKENS = jnp.arange(6).reshape(2, 3)


def terms_per_group(integers, axes, group_size):
    """The most terms that any group along the (merged) axes holds."""
    axes = tuple(a % integers.ndim for a in axes)
    moved = np.moveaxis(integers, axes, range(len(axes)))
    moved = moved.reshape(-1, *moved.shape[len(axes) :])
    terms = np.asarray(jax.jit(count)(moved))
    groups = [terms[i : i + group_size].sum(0) for i in range(0, len(terms), group_size)]
    return max(int(g.max()) for g in groups)


LAYERS = {
    "linear": (lambda: nnx.Linear(8, 4, rngs=rngs()), X, (0,)),
    "conv": (lambda: nnx.Conv(8, 4, (3, 3), rngs=rngs()), X, (2,)),
    "conv groups": (
        lambda: nnx.Conv(8, 4, (3, 3), feature_group_count=2, rngs=rngs()),
        X,
        (2,),
    ),
    "depthwise dilated": (
        lambda: nnx.Conv(8, 8, (3, 3), feature_group_count=8, kernel_dilation=2, rngs=rngs()),
        X,
        (0, 1),
    ),
    "conv 1-D": (lambda: nnx.Conv(8, 4, (3,), rngs=rngs()), X[0], (1,)),
    "transposed": (lambda: nnx.ConvTranspose(8, 4, (2, 2), rngs=rngs()), X, (2,)),
    "transposed kernel": (
        lambda: nnx.ConvTranspose(8, 4, (2, 2), transpose_kernel=True, rngs=rngs()),
        X,
        (3,),
    ),
    "general": (
        lambda: nnx.LinearGeneral((6, 8), (2, 3), axis=(-2, -1), rngs=rngs()),
        X,
        (0, 1),
    ),
    "einsum": (lambda: nnx.Einsum("nhwc,wcd->nhd", (6, 8, 3), rngs=rngs()), X, (0, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_keeps_its_budget_along_its_reduction(name):
    build, x, axes = LAYERS[name]
    model = stp_jax.quantize(
        build(), policy(budget=5, group_size=4, weight_scale="max", activations="none")
    )
    integers = stp_jax.integer_weights(model)[""]
    assert terms_per_group(integers, axes, 4) == 5
    assert np.abs(integers).max() <= 127
    # The call computes with exactly these weights.
    projected = build()
    projected.kernel[...] = stp_jax.project_params(model)["kernel"][...]
    np.testing.assert_allclose(call(model, x), projected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv", "conv groups"])
def test_all_terms_are_int8_rounding_per_output_channel(name):
    build, x, _ = LAYERS[name]
    layer = build()
    model = stp_jax.quantize(layer, policy(weight_scale="max", activations="none"))
    kernel = np.asarray(layer.kernel[...])
    scale = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True) / 127
    layer.kernel[...] = jnp.asarray(scale * np.round(kernel / scale))
    np.testing.assert_allclose(model(x), layer(x), rtol=1e-5, atol=1e-5)


def test_output_channels_are_independent():
    layer = nnx.Linear(8, 6, rngs=rngs())
    order = np.array([3, 1, 5, 0, 2, 4])
    shuffled = nnx.clone(layer)
    shuffled.kernel[...] = layer.kernel[...][:, order]
    rule = policy(budget=4, weight_scale="max", activations="none")
    out = stp_jax.quantize(layer, rule)(X)
    np.testing.assert_allclose(
        stp_jax.quantize(shuffled, rule)(X), out[..., order], rtol=1e-6, atol=1e-6
    )


def test_gradients_are_straight_through():
    layer = nnx.Linear(8, 4, rngs=rngs())
    x = X[0, 0]
    model = stp_jax.quantize(layer, policy(budget=4, weight_scale="max", activations="none"))
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    out = np.asarray(model(x))
    # d sum(sin(x q)) / dq with q in place of the kernel; no weight lies outside at the max scale.
    expected = np.asarray(x).T @ np.cos(out)
    np.testing.assert_allclose(grads["kernel"][...], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def block():
    """A float transformer block and the same as a calibrated STP model."""
    model = Block(rngs())
    rules = [Rule(path="attention.(key|value)", keep_float=True), Rule(path=".*", budget=16)]
    quantized = stp_jax.quantize(model, Policy(rules))
    stp_jax.calibrate(quantized, [TOKENS])
    return model, quantized


def test_parameters_keep_paths_values_and_types(block):
    model, quantized = block
    mine = nnx.Not(nnx.Any(WeightScale, ActivationScale))
    fresh = dict(nnx.to_flat_state(nnx.state(Block(rngs()), nnx.Param)))
    before = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    after = dict(nnx.to_flat_state(nnx.state(quantized, nnx.All(nnx.Param, mine))))
    assert fresh.keys() == before.keys() == after.keys()
    for path, value in fresh.items():
        assert type(value) is type(before[path]) is type(after[path])
        np.testing.assert_array_equal(value[...], before[path][...])
        np.testing.assert_array_equal(value[...], after[path][...])
    assert not isinstance(model.up.promote_dtype, nnx.Module)


def test_transformer_block_under_every_transformation(block):
    float_model, model = block
    assert set(stp_jax.budgets(model)) == {"attention.query", "attention.out", "up", "down"}
    graphdef, state = nnx.split(model)
    exact = float_model(TOKENS)
    merged = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, TOKENS)
    assert 0 < jnp.abs(merged - exact).max() < 0.5 * jnp.abs(exact).max()

    @nnx.jit
    def gradients(model, x):
        def plain(model):
            out = model(x)
            return jnp.sum(out**2), out

        def rematerialised(model):
            return jnp.sum(nnx.remat(lambda model, x: model(x))(model, x) ** 2)

        return nnx.grad(plain, has_aux=True)(model), nnx.grad(rematerialised)(model)

    (plain, out), again = gradients(model, TOKENS)
    np.testing.assert_allclose(out, merged, rtol=1e-4, atol=1e-4)
    assert jnp.abs(plain["up"]["promote_dtype"]["weight_scale"][...]).max() > 0
    assert jnp.abs(plain["up"]["promote_dtype"]["activation_scale"][...]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), plain, again)


def test_embeddings_are_quantized_only_when_asked(block):
    assert "embed" not in stp_jax.budgets(block[1])
    table = nnx.Embed(10, 8, rngs=rngs())
    model = stp_jax.quantize(table, policy(budget=4, weight_scale="max", embeddings=True))
    assert terms_per_group(stp_jax.integer_weights(model)[""], (1,), 8) == 4
    expected = stp_jax.project_params(model)["embedding"][...][TOKENS]
    np.testing.assert_allclose(call(model, TOKENS), expected, rtol=1e-6)


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell])
def test_recurrent_cells_under_rnn(cell):
    float_model = nnx.RNN(cell(8, 4, rngs=rngs()))
    model = stp_jax.quantize(float_model, policy(weight_scale="max"))
    stp_jax.calibrate(model, [X[0]])
    exact, out = call(float_model, X[0]), call(model, X[0])
    assert 0 < jnp.abs(out - exact).max() < 0.1 * jnp.abs(exact).max()


def test_shared_layers_are_quantized_once():
    class Shared(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(8, 8, rngs=rngs())
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    model = stp_jax.quantize(Shared(), policy(budget=4, activations="none"))
    assert model.first is model.second
    assert len(stp_jax.quantized_layers(model)) == 1


def test_shardings_of_kernels_stay():
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    with jax.set_mesh(mesh):
        layer = nnx.Linear(
            8,
            4,
            kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")),
            rngs=rngs(),
        )
        model = stp_jax.quantize(layer, policy(budget=4, activations="none"))
        assert model.kernel.get_metadata() == layer.kernel.get_metadata()
        expected = NamedSharding(mesh, PartitionSpec(None, "model"))
        assert model.kernel[...].sharding.is_equivalent_to(expected, 2)
        jitted = call(model, X[0, 0])
    projected = stp_jax.project_params(model)["kernel"][...]
    np.testing.assert_allclose(jitted, X[0, 0] @ projected, rtol=1e-5, atol=1e-5)


def test_bfloat16_layers_stay_bfloat16():
    layer = nnx.Linear(8, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs())
    model = stp_jax.quantize(layer, policy(budget=8))
    x = X[0, 0].astype(jnp.bfloat16)
    stp_jax.calibrate(model, [x])
    assert model(x).dtype == jnp.bfloat16
    assert stp_jax.project_params(model)["kernel"][...].dtype == jnp.bfloat16


def test_stacked_layers_have_budgets_of_their_own():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,))
    def stack(rngs):
        return nnx.Linear(8, 8, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return layer(x)

    layers = stack(rngs())
    with pytest.raises(ValueError, match="one by one"):
        stp_jax.quantize(layers, policy(budget=4))
    rule = policy(budget=4, activations="none")
    model = nnx.vmap(lambda layer: stp_jax.quantize(layer, rule))(layers)
    stp_jax.set_budgets(model, {"": [2, 4, 6]})
    assert stp_jax.budgets(model) == {"": [2, 4, 6]}
    integers = stp_jax.integer_weights(model)[""]
    assert [terms_per_group(v, (0,), 8) for v in integers] == [2, 4, 6]
    out = X[0, 0]
    for i in range(3):
        out = out @ stp_jax.project_params(model)["kernel"][...][i]
    np.testing.assert_allclose(through(model, X[0, 0]), out, rtol=1e-4, atol=1e-4)
    stp_jax.search_weight_scales(model)
    with pytest.raises(ValueError, match="stack"):
        stp_jax.group_counts(model)
    with pytest.raises(ValueError, match=r"for \(3,\) stacked layers with 8 filters"):
        stp_jax.set_budgets(model, {"": [2, 4]})


def test_set_budgets_compiles_nothing():
    model = stp_jax.quantize(nnx.Linear(8, 4, rngs=rngs()), policy(budget=8, weight_scale="max"))
    traces = []

    @nnx.jit
    def counted(model, x):
        traces.append(1)
        return model(x)

    few = []
    for budget in (0, 3, 32):
        stp_jax.set_budgets(model, {"": budget})
        few.append(counted(model, X))
    assert len(traces) == 1
    assert stp_jax.budgets(model) == {"": 32}
    assert not few[0].any()
    assert not np.array_equal(few[1], few[2])


def test_calibration_finds_the_scale_of_least_error():
    model = stp_jax.quantize(nnx.Linear(8, 4, rngs=rngs()), policy(activations="calibrated"))
    x = X.at[0, 0, 0, 0].set(100.0)  # one outlier, which clipping to the largest would not serve
    float_out = nnx.Linear(8, 4, rngs=rngs())(2 * X)
    untouched = stp_jax.quantize(nnx.Linear(8, 4, rngs=rngs()), policy(activations="none"))
    np.testing.assert_allclose(model(2 * X), untouched(2 * X))  # float before calibration
    stp_jax.calibrate(model, [X, 2 * X, X])
    scale = float(model.promote_dtype.activation_scale[...])
    rounded = scale * np.clip(np.round(np.asarray(2 * X) / scale), -127, 127)
    peak = float(jnp.abs(2 * X).max())
    plain = peak / 127 * np.round(np.asarray(2 * X) * 127 / peak)
    assert np.mean((rounded - 2 * X) ** 2) <= np.mean((plain - 2 * X) ** 2) * (1 + 1e-6)
    assert jnp.abs(model(2 * X) - float_out).max() < 0.2
    stp_jax.calibrate(model, [x])
    assert model.promote_dtype.activation_scale[...] > scale


def test_dynamic_activations_equal_rounding_to_the_peak():
    layer = nnx.Linear(8, 4, rngs=rngs())
    model = stp_jax.quantize(layer, policy(activations="dynamic", weight_scale="max"))
    scale = np.abs(np.asarray(X)).max() / 127
    x = jnp.asarray(scale * np.round(np.asarray(X) / scale))
    weights_only = stp_jax.quantize(layer, policy(activations="none", weight_scale="max"))
    np.testing.assert_allclose(model(X), weights_only(x), rtol=1e-5, atol=1e-5)


def test_searched_scale_beats_the_largest_weight():
    layer = nnx.Linear(64, 4, rngs=rngs())
    errors = {}
    for choice in ("max", "search", "learned"):
        rule = policy(budget=6, weight_scale=choice, activations="none")
        projected = stp_jax.project_params(stp_jax.quantize(layer, rule))
        errors[choice] = float(jnp.sum((projected["kernel"][...] - layer.kernel[...]) ** 2))
    assert errors["search"] == errors["learned"] < errors["max"]


def test_only_learned_scales_are_parameters():
    fixed = stp_jax.quantize(
        nnx.Linear(8, 4, rngs=rngs()), policy(weight_scale="search", activations="calibrated")
    )
    assert set(nnx.state(fixed, nnx.Param)) == {"kernel", "bias"}


def test_project_params_takes_budgets_in_place_of_the_models():
    model = stp_jax.quantize(nnx.Linear(8, 4, rngs=rngs()), policy(budget=8))

    @jax.jit
    def project(budget):
        return stp_jax.project_params(model, {"": budget})["kernel"][...]

    assert not project(jnp.int32(0)).any()
    np.testing.assert_allclose(
        project(jnp.int32(8)), stp_jax.project_params(model)["kernel"][...], rtol=1e-6
    )


def test_mistakes_are_named():
    layer = nnx.Linear(8, 4, rngs=rngs())
    model = stp_jax.quantize(layer, policy(budget=4))
    with pytest.raises(ValueError, match="quantized already"):
        stp_jax.quantize(model, policy())
    with pytest.raises(UnmatchedRuleError, match="near misses: attention"):
        stp_jax.quantize(Block(rngs()), Policy([Rule(path="atention.query")]))
    with pytest.raises(TypeError, match="Flax NNX or Linen module, got dict"):
        stp_jax.quantize({}, policy())
    with pytest.raises(ValueError, match="no quantized layer"):
        stp_jax.budgets(layer)
    with pytest.raises(ValueError, match="no quantized layer at head"):
        stp_jax.set_budgets(model, {"head": 4})
    with pytest.raises(ValueError, match="outside"):
        stp_jax.set_budgets(model, {"": 99})
    assert stp_jax.budgets(model) == {"": 4}
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.calibrate(model, [])
    split = nnx.Einsum("nac,adc->nd", (2, 3, 8), rngs=rngs())
    with pytest.raises(ValueError, match="adjacent"):
        stp_jax.quantize(split, policy())
    with pytest.raises(ValueError, match="name the kernel's axes"):
        stp_jax.quantize(nnx.Einsum("nc,...cd->n...d", (2, 8, 3), rngs=rngs()), policy())


def test_a_number_sets_every_budget_and_names_are_checked():
    model = stp_jax.quantize(
        nnx.Sequential(nnx.Linear(8, 8, rngs=rngs()), nnx.Linear(8, 4, rngs=rngs())),
        Policy([Rule(path="layers.0"), Rule(path=".*", budget=7)]),
    )
    stp_jax.set_budgets(model, 3)
    assert stp_jax.budgets(model) == {"layers.1": 3}
    with pytest.raises(ValueError, match=r"no quantized layer at layer\.1; there are: layers\.0"):
        stp_jax.project_params(model, {"layer.1": 3})
    with pytest.raises(ValueError, match="no quantized layer at fc"):
        stp_jax.search_weight_scales(model, importance={"fc": jnp.ones((8, 4))})


def test_linen_models_are_told_apart():
    model = stp_jax.quantize(linen.Dense(4), policy(budget=7))
    for function in (stp_jax.budgets, stp_jax.quantized_layers, stp_jax.integer_model):
        with pytest.raises(TypeError, match=r"with its variables; .* model\.bind\(variables\)"):
            function(model)
    with pytest.raises(TypeError, match=r"expected an nnx\.Module or a Linen model .* got dict"):
        stp_jax.budgets({})
    with pytest.raises(TypeError, match=r"expected an nnx\.Module, got QuantizedModule"):
        stp_jax.kernel_paths(model)


class Scaled(nnx.Module):
    """A layer whose call takes two arguments."""

    def __init__(self, rngs):
        self.fc = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x, factor):
        return self.fc(x * factor)


def test_calibration_calls_the_model_as_told():
    model = stp_jax.quantize(Scaled(rngs()), policy(budget=7))
    stp_jax.calibrate(model, [(X[0, 0], 3.0)], call=lambda model, batch: model(*batch))
    alone = stp_jax.quantize(Scaled(rngs()).fc, policy(budget=7))
    stp_jax.calibrate(alone, [3.0 * X[0, 0]])
    scales = [m.promote_dtype.activation_scale[...] for m in (model.fc, alone)]
    np.testing.assert_array_equal(*scales)
    with pytest.raises(TypeError, match="give \\[x\\] for one of"):
        stp_jax.calibrate(alone, X[0, 0])


def test_guidance_needs_no_change_of_the_train_step():
    model = stp_jax.quantize(nnx.Linear(8, 4, rngs=rngs()), policy(budget=7, activations="none"))
    tx = optax.chain(optax.sgd(0.0), stp_jax.guidance(model, 1.0, budgets={"": 2}))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    goal = stp_jax.project_params(model, {"": 2})["kernel"][...]

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(X)))(model))

    step(model, optimizer)
    np.testing.assert_allclose(model.kernel[...], goal, rtol=1e-6)
    with pytest.raises(ValueError, match="no quantized layer at fc"):
        stp_jax.guidance(model, 0.1, budgets={"fc": 2})


def test_a_batch_of_zeros_says_nothing_of_the_inputs():
    x = 0.02 * jax.random.normal(jax.random.key(3), (16, 64))
    scales = []
    for batches in ([x], [x, jnp.zeros_like(x)], [jnp.zeros_like(x)]):
        model = stp_jax.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), policy())
        stp_jax.calibrate(model, batches)
        scales.append(float(model.promote_dtype.activation_scale[...].squeeze()))
    assert 0 < scales[0] == scales[1] and scales[2] == 0


def test_kernels_that_begin_with_zeros_can_leave_them():
    zeros = nnx.initializers.zeros
    x = jax.random.normal(jax.random.key(3), (64, 64))
    losses = []
    for quantized in (False, True):
        model = nnx.Linear(64, 4, kernel_init=zeros, rngs=nnx.Rngs(0))
        model = stp_jax.quantize(model, policy(weight_scale="learned")) if quantized else model
        optimizer = nnx.Optimizer(model, optax.sgd(0.2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(
                lambda model: jnp.mean((model(x) - jnp.tanh(x[:, :4])) ** 2)
            )(model)
            optimizer.update(model, grads)
            return loss

        losses.append([float(step(model, optimizer)) for _ in range(20)][-1])
    assert losses[1] < 1.1 * losses[0]


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_that_a_norm_changes_are_refused_unless_kept_float(norm):
    model = nnx.Sequential(norm(nnx.Linear(8, 4, rngs=rngs()), rngs=rngs()))
    with pytest.raises(ValueError, match=rf"layer_instance'.*{norm.__name__} changes its kernel"):
        stp_jax.quantize(model, policy(budget=4))
    other = nnx.Sequential(*model.layers, nnx.Linear(4, 4, rngs=rngs()))
    kept = stp_jax.quantize(other, stp_jax.Policy([stp_jax.Rule(path="layers.1", budget=4)]))
    assert list(stp_jax.budgets(kept)) == ["layers.1"]

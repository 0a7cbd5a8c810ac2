"""STP on Linen modules as Flax's documentation writes them."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule
from stp_jax.quant.policy import UnmatchedRuleError
from stp_jax.terms import count

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 6, 8))
STATELESS = {"weight_scale": "max", "activations": "none"}


def quantize(module, **rule):
    return stp_jax.quantize(module, Policy([Rule(path=".*", **rule)]))


def init(module, *args):
    return jax.jit(module.init)(KEY, *args)


def drawn(module, *args):
    """Variables of the module's shapes without compiling its initialisers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, KEY, *args)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(0, 0.3, v.shape), v.dtype), shapes)


def apply(module, variables, *args, **options):
    return jax.jit(partial(module.apply, **options))(variables, *args)


def same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def same_initial_values(a, b):
    """Equal but for rounding: two programs may compute a normal variable differently."""
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-6)


class ResNetBlock(nn.Module):
    """A residual block, as in Flax's ImageNet example."""

    filters: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        residual = x
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3))(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.filters, (3, 3))(y))
        if residual.shape != y.shape:
            residual = self.norm(name="norm_proj")(
                self.conv(self.filters, (1, 1), name="conv_proj")(residual)
            )
        return nn.relu(residual + y)


class ResNet(nn.Module):
    """A ResNet of one block, as in Flax's ImageNet example."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="bn_init")(conv(8, (1, 1), name="conv_init")(x)))
        x = ResNetBlock(8, conv, norm)(x)
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


@pytest.fixture(scope="module")
def resnet():
    """An STP ResNet, its calibrated variables and those of the float module."""
    policy = Policy([Rule(path="conv_init|head", weight_scale="max"), Rule(path=".*", budget=10)])
    model = stp_jax.quantize(ResNet(), policy)
    variables = init(model, X)
    return model, model.calibrate(variables, [X], train=False), init(ResNet(), X)


def test_variables_are_the_modules_own_beside_two_collections(resnet):
    model, variables, float_variables = resnet
    assert set(variables) == {"params", "batch_stats", "stp", "stp_params"}
    same_initial_values(variables["params"], float_variables["params"])
    assert model.budgets(variables) == {
        "ResNetBlock_0.Conv_0": 10,
        "ResNetBlock_0.Conv_1": 10,
    }
    assert variables["stp"]["head"]["budget"].dtype == jnp.int32
    assert variables["stp_params"]["ResNetBlock_0"]["Conv_0"]["weight_scale"].shape == (1, 1, 1, 8)


def test_a_float_checkpoint_loads_as_it_is(resnet):
    model, variables, float_variables = resnet
    with pytest.raises(ValueError, match=r"conv_init.*no activation_scale.*mutable=\['stp'"):
        model.apply(float_variables, X, train=False)
    _, state = apply(model, float_variables, X, train=False, mutable=["stp", "stp_params"])
    same_tree(state["stp"], variables["stp"])
    assert jax.tree.structure(state["stp_params"]) == jax.tree.structure(variables["stp_params"])
    for conv in ("Conv_0", "Conv_1"):  # searched on the kernels given, as by init
        mine, expected = (v["stp_params"]["ResNetBlock_0"][conv] for v in (state, variables))
        np.testing.assert_allclose(mine["weight_scale"], expected["weight_scale"], rtol=1e-6)


def test_train_step_updates_parameters_scales_and_statistics(resnet):
    model, variables, _ = resnet
    traces = []

    @jax.jit
    def step(variables, x):
        traces.append(1)

        def loss(trained):
            out, updated = model.apply({**variables, **trained}, x, mutable=["batch_stats"])
            return jnp.mean((out - 1.0) ** 2), updated

        trained = {name: variables[name] for name in ("params", "stp_params")}
        (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        trained = jax.tree.map(lambda p, g: p - jnp.float32(0.05) * g, trained, grads)
        return {**variables, **trained, **updated}, value, grads

    losses, now = [], variables
    for budget in (10, 10, 10, 3):
        now = model.set_budgets(now, dict.fromkeys(model.budgets(now), budget))
        now, value, grads = step(now, X)
        losses.append(float(value))
    assert losses[2] < losses[0]
    assert len(traces) == 1  # a budget is data
    assert jax.tree.structure(now) == jax.tree.structure(variables)
    scales = grads["stp_params"]["ResNetBlock_0"]["Conv_1"]
    assert jnp.abs(scales["weight_scale"]).max() > 0
    assert jnp.abs(scales["activation_scale"]).max() > 0


def test_calibrated_outputs_stay_near_the_float_modules(resnet):
    model, variables, float_variables = resnet
    exact = apply(ResNet(), float_variables, X, train=False)
    out = apply(model, variables, X, train=False)
    assert 0 < jnp.abs(out - exact).max() < 0.5 * jnp.abs(exact).max()


def test_a_call_that_returns_nothing_calibrates_nothing_and_is_refused():
    model = quantize(nn.Dense(4))
    bound = model.bind(init(model, X))
    with pytest.raises(ValueError, match="must return the model's outputs"):
        stp_jax.calibrate(bound, [X], call=lambda m, x: None)


def groups_of(integers, axes, group_size):
    moved = np.moveaxis(integers, axes, range(len(axes)))
    moved = moved.reshape(-1, *moved.shape[len(axes) :])
    terms = np.asarray(jax.jit(count)(moved))
    return [terms[i : i + group_size].sum(0) for i in range(0, len(terms), group_size)]


@pytest.mark.parametrize(
    ("module", "x", "axes"),
    [
        (nn.Dense(4), X, (0,)),
        (nn.Conv(4, (3, 3), feature_group_count=2), X, (2,)),
        (nn.Conv(8, (3, 3), feature_group_count=8, kernel_dilation=2), X, (0, 1)),
        (nn.Conv(4, 3), X[0], (1,)),
        (nn.ConvLocal(4, (3,)), X[0], (1,)),
        (nn.ConvTranspose(4, (2, 2)), X, (2,)),
        (nn.ConvTranspose(4, (2, 2), transpose_kernel=True), X, (3,)),
        (nn.DenseGeneral((2, 3), axis=(-2, -1)), X, (0, 1)),
        (nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), X[0, 0][None], (1,)),
        (nn.Einsum((6, 8, 3), "nhwc,wcd->nhd"), X, (0, 1)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_every_layer_keeps_its_budget_along_its_reduction(module, x, axes):
    model = quantize(module, budget=5, group_size=4, **STATELESS)
    variables = drawn(module, x)  # the float module's own: nothing else is needed
    out = apply(model, variables, x)
    groups = groups_of(model.integer_weights(variables)[""], axes, 4)
    assert max(int(g.max()) for g in groups) == 5
    projected = {"params": model.project_params(variables)}
    np.testing.assert_allclose(out, apply(module, projected, x), rtol=1e-5, atol=1e-5)


def test_linen_and_nnx_agree():
    linen = nn.Dense(4)
    params = drawn(linen, X)["params"]
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = params["kernel"], params["bias"]
    policy = Policy([Rule(path="", budget=6, group_size=4)])
    on_nnx, on_linen = stp_jax.quantize(layer, policy), stp_jax.quantize(linen, policy)
    _, state = apply(on_linen, {"params": params}, X, mutable=["stp", "stp_params"])
    variables = on_linen.calibrate({"params": params, **state}, [X, 2 * X])
    stp_jax.calibrate(on_nnx, [X, 2 * X])
    out = apply(on_linen, variables, X)
    np.testing.assert_allclose(out, on_nnx(X), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        on_linen.integer_weights(variables)[""], stp_jax.integer_weights(on_nnx)[""]
    )


def test_attention_quantizes_its_projections():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    shapes = jax.eval_shape(quantize(module, budget=20).init, KEY, X[0])
    assert set(shapes["stp"]) == {"query", "key", "value", "out"}
    model = stp_jax.quantize(module, Policy([Rule(path="query|out", budget=20, **STATELESS)]))
    variables = drawn(module, X[0])
    out = apply(model, variables, X[0])
    expected = apply(module, {"params": model.project_params(variables)}, X[0])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cell", "layers"), [(nn.LSTMCell, 8), (nn.OptimizedLSTMCell, 8), (nn.GRUCell, 6)]
)
def test_products_of_recurrent_cells_are_layers(cell, layers):
    shapes = jax.eval_shape(quantize(nn.RNN(cell(4))).init, KEY, X[0])
    assert len(shapes["stp"]["cell"]) == layers


def test_recurrent_cells_under_rnn():
    module = nn.RNN(nn.LSTMCell(4))
    model = quantize(module, weight_scale="max")
    variables = init(model, X[0])
    same_initial_values(variables["params"], init(module, X[0])["params"])
    variables = model.calibrate(variables, [X[0]])
    assert all(scale > 0 for scale in jax.tree.leaves(variables["stp_params"]))
    exact = apply(module, variables, X[0])
    out = apply(model, variables, X[0])
    assert 0 < jnp.abs(out - exact).max() < 0.1 * jnp.abs(exact).max()


def test_the_optimized_lstm_equals_the_plain_one():
    cells = (nn.LSTMCell, nn.OptimizedLSTMCell)
    plain, optimized = (quantize(nn.RNN(cell(4)), **STATELESS) for cell in cells)
    variables = init(nn.RNN(nn.OptimizedLSTMCell(4)), X[0])
    same_initial_values(init(optimized, X[0])["params"], variables["params"])
    np.testing.assert_allclose(
        apply(plain, variables, X[0]), apply(optimized, variables, X[0]), rtol=1e-6
    )


def test_a_cell_without_hooks_is_an_error_unless_kept_float():
    class Own(nn.OptimizedLSTMCell):
        pass

    module = nn.RNN(Own(4))
    with pytest.raises(ValueError, match=r"cell.*derive it from nn\.LSTMCell"):
        jax.eval_shape(quantize(module).init, KEY, X[0])
    kept = stp_jax.quantize(module, Policy([Rule(path="cell.*", keep_float=True)]))
    variables = drawn(module, X[0])
    same_tree(apply(kept, variables, X[0]), apply(module, variables, X[0]))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, use_bias=False)(x), None


class Stack(nn.Module):
    """Three blocks under scan and remat, their parameters stacked along an axis."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            nn.remat(Residual),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return block(name="block")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_have_budgets_and_scales_of_their_own(axis):
    x = X[0, 0]
    model = quantize(Stack(axis), budget=12)
    variables = init(model, x)
    same_initial_values(variables["params"], init(Stack(axis), x)["params"])
    path = "block.Dense_0"
    assert model.budgets(variables) == {path: [12, 12, 12]}
    variables = model.set_budgets(variables, {path: [2, 4, 6]})
    integers = np.moveaxis(model.integer_weights(variables)[path], axis, 0)
    assert [max(g.max() for g in groups_of(v, (0,), 8)) for v in integers] == [2, 4, 6]
    variables = model.search_weight_scales(variables)
    projected = model.project_params(variables)["block"]["Dense_0"]["kernel"]
    by_hand, seen = x, []
    for kernel in np.moveaxis(np.asarray(projected), axis, 0):
        seen.append(by_hand)
        by_hand = by_hand + by_hand @ kernel
    out = apply(model, variables, x)
    np.testing.assert_allclose(out, by_hand, rtol=1e-4, atol=1e-4)
    variables = model.calibrate(variables, [x])
    scales = variables["stp_params"]["block"]["Dense_0"]["activation_scale"].reshape(-1)
    for scale, value in zip(scales, seen, strict=True):
        assert 0.2 * jnp.abs(value).max() / 127 <= scale * 1.001
        assert scale <= 1.001 * jnp.abs(value).max() / 127


def test_vmapped_layers_are_layers_of_their_own():
    module = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(4)
    model = quantize(module, budget=4, **STATELESS)
    variables = init(model, X[0])
    by_hand = jnp.matmul(X[0], model.project_params(variables)["kernel"])
    np.testing.assert_allclose(apply(model, variables, X[0]), by_hand, rtol=1e-4, atol=1e-5)


def test_traces_kept_by_flax_jit_are_not_mixed_up():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, use_bias=False)(x)

    module, x = nn.jit(Inner)(), X[0, 0]
    variables = init(module, x)
    exact = module.apply(variables, x)
    model = quantize(module, budget=3, weight_scale="max", activations="calibrated")
    for _ in range(2):  # the second time from the cache
        state = model.calibrate(model.init(KEY, x), [x])
    doubled = model.calibrate(state, [2 * x])
    few = quantize(module, budget=3, **STATELESS)
    by_hand = x @ few.project_params(few.init(KEY, x))["Dense_0"]["kernel"]
    np.testing.assert_allclose(few.apply(variables, x), by_hand, rtol=1e-5, atol=1e-6)
    assert not np.allclose(by_hand, exact)
    scales = [v["stp"]["Dense_0"]["activation_scale"] for v in (state, doubled)]
    np.testing.assert_allclose(2 * scales[0], scales[1], rtol=1e-5)


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def setup(self):
        self.table = nn.Embed(10, 8)

    def __call__(self, tokens):
        return self.table.attend(self.table(tokens))

    def encode(self, tokens):
        return self.table(tokens)


def test_embeddings_are_quantized_only_when_asked():
    tokens = jnp.arange(4)
    with pytest.raises(UnmatchedRuleError, match="embeddings=True"):
        jax.eval_shape(quantize(Tied(), budget=4).init, KEY, tokens)
    model = quantize(Tied(), budget=4, embeddings=True, **STATELESS)
    variables = init(model, tokens)
    table = model.project_params(variables)["table"]["embedding"]
    np.testing.assert_allclose(
        apply(model, variables, tokens), table[:4] @ table.T, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        apply(model, variables, tokens, method="encode"), table[:4], rtol=1e-6
    )
    np.testing.assert_allclose(
        apply(model, variables, tokens, method=model.encode), table[:4], rtol=1e-6
    )


def test_partitioning_metadata_stays():
    split = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Dense(4, kernel_init=split)
    model = quantize(module, budget=4, **STATELESS)
    variables = init(model, X)
    specs, mine = (nn.get_partition_spec(v) for v in (module.init(KEY, X), variables))
    assert mine["params"] == specs["params"]
    assert nn.get_partition_spec(model.project_params(variables)) == specs["params"]


def test_bfloat16_layers_stay_bfloat16():
    model = quantize(nn.Dense(4, dtype=jnp.bfloat16), budget=8, weight_scale="max")
    variables = jax.eval_shape(model.init, KEY, X)
    assert jax.eval_shape(model.apply, variables, X).dtype == jnp.bfloat16


def test_equal_models_are_equal_and_hashable():
    a, b = quantize(nn.Dense(4)), quantize(nn.Dense(4))
    assert a == b and hash(a) == hash(b)
    assert a != quantize(nn.Dense(5))
    assert a.features == 4
    with pytest.raises(AttributeError, match="lazy_init"):
        _ = a.lazy_init  # would run the float module


class Dotted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense.0")(x)


def test_mistakes_are_named():
    x = X[0, 0]
    with pytest.raises(UnmatchedRuleError, match="near misses: block"):
        stp_jax.quantize(Stack(), Policy([Rule(path="blok.Dense_0")])).init(KEY, x)
    with pytest.raises(ValueError, match="adjacent"):
        quantize(nn.Einsum((2, 3, 8), "nac,adc->nd")).init(KEY, X[0, :, :2])
    with pytest.raises(ValueError, match=r"the name 'dense\.0' may hold none"):
        quantize(Dotted()).init(KEY, x)
    model = quantize(nn.Dense(4), budget=4, weight_scale="max")
    with pytest.raises(ValueError, match="eval_shape"):
        model.project_params({"params": {}})
    variables = init(model, x)
    with pytest.raises(ValueError, match="at least one batch"):
        model.calibrate(variables, [])
    with pytest.raises(ValueError, match="no quantized layer at head"):
        model.set_budgets(variables, {"head": 4})
    with pytest.raises(ValueError, match="outside"):
        model.set_budgets(variables, {"": 99})
    with pytest.raises(ValueError, match=r"shape \(2,\) for 4 filters"):
        model.set_budgets(variables, {"": [1, 2]})
    with pytest.raises(ValueError, match="no collection 'stp'"):
        model.set_budgets({"params": variables["params"]}, {"": 3})
    assert model.budgets({"params": variables["params"]}) == {"": 4}  # the rule's, as by apply
    with pytest.raises(ValueError, match="unbound"):
        stp_jax.quantize(nn.Dense(4).bind({}), Policy([Rule(path=".*")]))


def test_binding_with_an_input_finds_layers_that_another_method_left_out():
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(4), nn.Dense(8)

        def encode(self, x):
            return self.encoder(x)

        def __call__(self, x):
            return self.decoder(self.encode(x))

    x = X[..., :8]
    variables = init(quantize(Coder(), budget=8), x)
    again = quantize(Coder(), budget=8)
    again.apply(variables, x, method="encode")
    assert set(stp_jax.budgets(again.bind(variables, x))) == {"encoder", "decoder"}


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_kernels_that_a_norm_changes_are_refused_unless_kept_float(norm):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": False} if norm is nn.SpectralNorm else {}
            return nn.Dense(2, name="after")(norm(nn.Dense(4, name="inside"))(x, **options))

    x = X[0, 0]
    with pytest.raises(ValueError, match=rf"layer 'inside': {norm.__name__} changes its kernel"):
        init(quantize(Model()), x)
    kept = stp_jax.quantize(Model(), Policy([Rule(path="after", budget=4)]))
    assert list(stp_jax.budgets(kept.bind(init(kept, x)))) == ["after"]

"""Hooks reach every layer of NNX and Linen models, once, and leave the models as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stp_jax import hooks
from stp_jax.hooks import Hooks, LinenModel

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x).reshape(len(x), -1, 4)
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(6, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(self.norm(self.conv(x)).reshape(len(x), -1, 4))


def linen(module, *args):
    return LinenModel(module, jax.jit(module.init)(jax.random.key(0), *args))


MODELS = {"nnx": NNX, "linen": lambda: linen(Linen(), X)}


@pytest.mark.parametrize("api", MODELS)
def test_every_call_is_replaced_once(api):
    model, seen = MODELS[api](), []

    def counting(what, function):
        def counted(*args, **kwargs):
            seen.append(what)
            return function(*args, **kwargs)

        return counted

    hooked = hooks.attach(
        model,
        Hooks(
            operands=lambda layer, f: counting(("operands", layer.path), f),
            product=lambda layer, f: counting(("product", layer.path, layer.kind), f),
            attention=lambda path, f: counting(("attention", path), f),
            batch_norm_input=lambda path, x: seen.append(("norm", path, x.shape)),
        ),
    )
    expected = model(X)
    assert not seen
    np.testing.assert_array_equal(hooked(X), expected)
    projections = [f"attention.{name}" for name in ("query", "key", "value")]
    order = [("operands", "conv"), ("product", "conv", "conv"), ("norm", "norm", (2, 4, 4, 4))]
    for path in projections:
        order += [("operands", path), ("product", path, "general")]
    order += [("attention", "attention")]
    order += [("operands", "attention.out"), ("product", "attention.out", "general")]
    assert seen == order


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("api", MODELS)
def test_batch_statistics_are_those_of_training_and_leave_the_running_ones(api, axis):
    channels = jnp.arange(X.shape[axis], dtype=jnp.float32)
    shift, scale = channels - 1.0, channels / 3.0 + 0.5
    if api == "nnx":
        model = nnx.BatchNorm(X.shape[axis], axis=axis, use_running_average=True, rngs=nnx.Rngs(0))
        model.mean[...], model.var[...] = shift, scale
        model.scale[...], model.bias[...] = scale, shift
        trained = nnx.clone(model)
        trained.use_running_average = False
        expected = trained(X)
    else:
        norm = nn.BatchNorm(use_running_average=True, axis=axis)
        running = {"mean": shift, "var": scale}
        model = LinenModel(
            norm, {"params": {"scale": scale, "bias": shift}, "batch_stats": running}
        )
        training = norm.clone(use_running_average=False)
        expected, _ = training.apply(model.variables, X, mutable="batch_stats")
    before = model(X)
    hooked = hooks.attach(model, Hooks(batch_statistics=True))
    np.testing.assert_allclose(hooked(X), expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(before - expected))) > 0.1
    np.testing.assert_array_equal(model(X), before)
    np.testing.assert_array_equal(hooks.attach(hooked, Hooks())(X), hooked(X))
    if api == "nnx":
        np.testing.assert_array_equal(hooked.mean[...], shift)
    else:
        np.testing.assert_allclose(hooked(x=X), expected, atol=1e-5)


@pytest.mark.parametrize("api", MODELS)
def test_later_hooks_are_outside_of_earlier_ones(api):
    def scaled(factor):
        def wrap(layer, product):
            if layer.path != "conv":
                return None
            return lambda x, *args, **kwargs: factor(product(x, *args, **kwargs))

        return Hooks(product=wrap)

    model = MODELS[api]()
    seen = []

    def noting(layer, product):
        def noted(*args, **kwargs):
            seen.append(product(*args, **kwargs))
            return seen[-1]

        return noted if layer.path == "conv" else None

    twice = hooks.attach(
        hooks.attach(hooks.attach(model, scaled(lambda y: y + 1.0)), scaled(lambda y: y * 2.0)),
        Hooks(product=noting),
    )
    hooks.attach(model, Hooks(product=noting))(X)
    twice(X)
    np.testing.assert_allclose(seen[1], (seen[0] + 1.0) * 2.0, rtol=1e-6)


def test_lifted_linen_layers_are_hooked_once():
    lifted = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(3)
    model, calls = linen(lifted, X[0, 0]), []

    def operands(layer, promote):
        def promoted(operands, **kwargs):
            calls.append(layer.path)
            return promote((operands[0] * 2.0, *operands[1:]), **kwargs)

        return promoted

    doubled = hooks.attach(model, Hooks(operands=operands))
    np.testing.assert_allclose(doubled(X[0, 0]), model(2 * X[0, 0]), rtol=1e-6)
    assert calls == [""]


def test_products_with_a_class_of_their_own_are_hooked():
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, *args, **kwargs):
            return 2.0 * jax.lax.dot_general(*args, **kwargs)

    model = linen(nn.Dense(3, dot_general_cls=Doubled), X)
    hooked = hooks.attach(
        model, Hooks(product=lambda layer, f: lambda *args, **kwargs: 3.0 * f(*args, **kwargs))
    )
    np.testing.assert_allclose(hooked(X), 3.0 * model(X), rtol=1e-5)  # its bias is zero


@pytest.mark.parametrize("api", MODELS)
def test_state_goes_out_of_a_model_and_back(api):
    model = MODELS[api]()
    state, rebuild = hooks.functional(model)
    np.testing.assert_array_equal(rebuild(state)(X), model(X))
    params, rebuild = hooks.trainable(model)
    zeros = rebuild(jax.tree.map(jnp.zeros_like, params))
    assert not zeros(X).any()
    assert hooks.get_variable(model, "norm", "mean").shape == (4,)
    changed = hooks.copy_model(model)
    hooks.set_variable(changed, "attention.out", "bias", jnp.ones(4))
    assert hooks.get_variable(changed, "attention.out", "bias").sum() == 4
    assert not hooks.get_variable(model, "attention.out", "bias").any()
    assert hooks.get_variable(model, "conv", "scale") is None


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(2, 0), (1, 1)]])
def test_patches_times_kernel_is_the_convolution(padding):
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 6, 5))
    options = {"rhs_dilation": (1, 2), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    with jax.default_matmul_precision("highest"):
        expected = jax.lax.conv_general_dilated(X, kernel, (2, 1), padding, **options)
        patches = hooks.conv_patches(X, kernel, (2, 1), padding, **options)
        found = patches.reshape(len(patches), -1) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


class NNXTied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(6, 4, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(6, 4, name="embed")
        return embed.attend(embed(tokens))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_embeddings_show_the_operands_of_their_product(api):
    tokens = jnp.arange(6)
    if api == "nnx":
        model = NNXTied()
        table = model.embed.embedding[...]
    else:
        variables = LinenTied().init(jax.random.key(0), tokens)
        model = LinenModel(LinenTied(), variables)
        table = variables["params"]["embed"]["embedding"]
    seen = []

    def attend(layer, query, shown):
        seen.append((layer.path, query, shown))
        return 2.0 * shown

    found = hooks.attach(model, Hooks(attend=attend))(tokens)
    ((path, query, shown),) = seen
    assert path == "embed"
    np.testing.assert_array_equal(query, table)  # tokens in order are the whole table
    np.testing.assert_array_equal(shown, table)
    np.testing.assert_allclose(found, 2.0 * model(tokens), rtol=1e-6)

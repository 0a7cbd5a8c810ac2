"""Scales by group: each run of weights is quantized as a layer of its own would be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stp_jax
from stp_jax.export import load_integers, load_packed, packed_sizes, save_packed
from stp_jax.terms import count

X = jax.random.normal(jax.random.key(1), (6, 44), jnp.float32)


def policy(scale_group=16, **options):
    options = {"weight_scale": "search", "activations": "none", "budget": 5, **options}
    return stp_jax.Policy([stp_jax.Rule(path=".*", scale_group=scale_group, **options)])


def dense():
    """A layer whose inputs are of very different strength, so that one scale fits them badly."""
    layer = nnx.Linear(44, 12, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...] * jnp.exp(jnp.arange(44) / 11)[:, None]
    return layer


class Wrapped(nnx.Module):
    def __init__(self):
        self.fc = dense()

    def __call__(self, x):
        return self.fc(x)


def layer_of(model):
    (layer,) = stp_jax.quantized_layers(model).values()
    return layer


@pytest.mark.parametrize("weight_scale", ["max", "search", "learned"])
def test_each_run_is_a_layer_of_its_own(weight_scale):
    model = dense()
    whole = layer_of(stp_jax.quantize(model, policy(weight_scale=weight_scale)))
    for start in (0, 16, 32):  # the last run is of 12
        kernel = model.kernel[...][start : start + 16]
        part = nnx.Linear(len(kernel), 12, use_bias=False, rngs=nnx.Rngs(0))
        part.kernel[...] = kernel
        alone = layer_of(stp_jax.quantize(part, policy(None, weight_scale=weight_scale)))
        rows = slice(start, start + 16)
        np.testing.assert_array_equal(whole.integers()[rows], alone.integers())
        np.testing.assert_array_equal(whole.projected()[rows], alone.projected())
    assert whole.shared_scale.shape == (3, 12)
    assert whole.scale.shape == (44, 12)


def test_groups_keep_their_budget_and_round_less():
    model = dense()
    errors = {}
    for size in (None, 16):
        layer = layer_of(stp_jax.quantize(model, policy(size, budget=20)))
        padded = np.pad(np.asarray(layer.integers()), ((0, 4), (0, 0)))
        assert np.asarray(count(padded)).reshape(6, 8, 12).sum(axis=1).max() <= 20
        errors[size] = float(jnp.sum((layer.projected() - layer.kernel) ** 2))
    assert errors[16] < errors[None]


def test_output_budgets_by_filter_and_gradients():
    stp = stp_jax.quantize(dense(), policy(weight_scale="learned"))
    layer = layer_of(stp)
    np.testing.assert_array_equal(stp(X), X @ layer.projected())
    stp_jax.set_budgets(stp, {"": jnp.arange(12) % 4 + 1})
    held = np.asarray(count(np.pad(np.asarray(layer.integers()), ((0, 4), (0, 0)))))
    assert (held.reshape(6, 8, 12).sum(axis=1).max(axis=0) <= np.arange(12) % 4 + 1).all()
    gradient = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(stp)
    of_scale = gradient["promote_dtype"]["weight_scale"][...]
    assert of_scale.shape == (3, 12)
    assert jnp.all(jnp.isfinite(of_scale))
    assert jnp.any(of_scale != 0)


def test_convolutions_in_both_apis():
    module = nn.Conv(5, (3, 3), use_bias=False)
    x = jax.random.normal(jax.random.key(2), (1, 6, 6, 16), jnp.float32)
    kernel = jax.random.normal(jax.random.key(3), (3, 3, 16, 5), jnp.float32)
    linen = stp_jax.quantize(module, policy(8))
    variables = linen.init(jax.random.key(0), x)
    variables["params"]["kernel"] = kernel
    bound = linen.bind(variables)
    stp_jax.search_weight_scales(bound)
    conv = nnx.Conv(16, 5, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    conv.kernel[...] = kernel
    stp = stp_jax.quantize(conv, policy(8))
    assert layer_of(stp).shared_scale.shape == (1, 1, 2, 5)
    np.testing.assert_array_equal(stp(x), bound(x))


@pytest.mark.parametrize("weight_scale", ["max", "search"])
def test_packed_files(tmp_path, weight_scale):
    model = Wrapped()
    stp = stp_jax.quantize(model, policy(weight_scale=weight_scale))
    stp_jax.set_budgets(stp, {"fc": jnp.arange(12) % 4 + 1})
    path = tmp_path / "dense.safetensors"
    save_packed(stp, path)
    again = load_packed(model, path)
    np.testing.assert_array_equal(stp(X), again(X))
    (stored,) = load_integers(path).values()
    np.testing.assert_array_equal(stored, layer_of(stp).integers())
    plain = packed_sizes(stp_jax.quantize(model, policy(None))).total
    assert packed_sizes(stp_jax.quantize(model, policy())).total.packed - plain.packed == 2 * 12 * 4


@pytest.mark.parametrize("size", [0, 12, 1.5, True])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="scale_group"):
        policy(size)


def test_what_takes_one_scale_per_channel_says_so():
    stp = stp_jax.quantize(dense(), policy(activations="calibrated"))
    stp_jax.calibrate(stp, [X])
    with pytest.raises(ValueError, match="scales by group"):
        stp_jax.integer_model(stp)
    with pytest.raises(ValueError, match="scales by group"):
        stp_jax.compensate(stp, [X], {"": 4})
    with pytest.raises(ValueError, match="scales by group"):
        stp_jax.reconstruct(stp, [X], {"": 4})
    window = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="along one axis"):
        stp_jax.quantize(window, policy(8))

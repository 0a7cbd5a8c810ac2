"""Compensation on whole models: the ratios are what running the layers gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax.terms import count

POLICY = stp_jax.Policy(
    [stp_jax.Rule(path=".*", budget=6, group_size=8, weight_scale="search", activations="none")]
)


def inputs(*shape):
    """Images whose neighbours and channels go together, as real ones do."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return x + 2 * jnp.roll(x, 1, axis=-1) + 2 * jnp.roll(x, 1, axis=1)


LAYERS = {
    "dense": (lambda r: nnx.Linear(24, 7, rngs=r), (300, 24)),
    "conv, strided": (lambda r: nnx.Conv(8, 6, (3, 3), strides=2, rngs=r), (20, 9, 9, 8)),
    "conv, dilated": (
        lambda r: nnx.Conv(8, 6, (3, 2), kernel_dilation=2, padding="VALID", rngs=r),
        (20, 9, 9, 8),
    ),
    "conv, ragged groups": (lambda r: nnx.Conv(11, 6, (3, 3), rngs=r), (20, 6, 6, 11)),
    "conv in 1-D": (lambda r: nnx.Conv(8, 6, (5,), rngs=r), (40, 12, 8)),
    "conv of one channel": (lambda r: nnx.Conv(1, 6, (4, 4), rngs=r), (40, 9, 9, 1)),
}


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", LAYERS)
def test_the_ratio_is_the_one_of_the_layers_outputs(name):
    make, shape = LAYERS[name]
    x = inputs(*shape)
    model = nnx.Sequential(make(nnx.Rngs(1)))
    stp = stp_jax.quantize(model, POLICY)
    plain = stp_jax.quantize(model, POLICY)
    exact = model(x)
    found = stp_jax.compensate(stp, [x[: len(x) // 2], x[len(x) // 2 :]], {"layers.0": 6})
    error = jnp.sum((stp(x) - exact) ** 2) / jnp.sum((plain(x) - exact) ** 2)
    np.testing.assert_allclose(found["layers.0"], error, rtol=2e-3)
    assert found["layers.0"] < 1
    # The kernel holds values that fit the budget, and the layer's projection leaves them alone.
    integers = stp_jax.integer_weights(stp)["layers.0"]
    kernel = stp.layers[0].kernel[...]
    scale = stp_jax.quantized_layers(stp)["layers.0"].scale
    np.testing.assert_allclose(scale * jnp.asarray(integers, scale.dtype), kernel, rtol=1e-6)
    groups = np.asarray(count(integers))
    if shape[-1] == 1:  # groups lie along the window
        groups = groups.reshape(-1, groups.shape[-1])
    groups = np.moveaxis(groups, -2, -1)
    groups = np.pad(groups, [(0, 0)] * (groups.ndim - 1) + [(0, -groups.shape[-1] % 8)])
    assert groups.reshape(-1, 8).sum(axis=1).max() <= 6


def test_layers_with_channel_groups_stay_as_they_are():
    model = nnx.Sequential(
        nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=nnx.Rngs(0)),
        nnx.Conv(8, 8, (1, 1), rngs=nnx.Rngs(1)),
    )
    stp = stp_jax.quantize(model, POLICY)
    before = stp.layers[0].kernel[...]
    found = stp_jax.compensate(stp, [inputs(4, 6, 6, 8)], {"layers.0": 4, "layers.1": 4})
    assert set(found) == {"layers.1"}
    np.testing.assert_array_equal(stp.layers[0].kernel[...], before)
    assert stp_jax.budgets(stp) == {"layers.0": 4, "layers.1": 4}


def test_wrong_calls_are_refused_and_change_nothing():
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    stp = stp_jax.quantize(model, POLICY)
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.compensate(stp, [], {"layers.0": 4})
    with pytest.raises(ValueError, match="no quantized layer at fc"):
        stp_jax.compensate(stp, [jnp.ones((2, 8))], {"fc": 4})
    assert stp_jax.budgets(stp) == {"layers.0": 6}
    depthwise = nnx.Sequential(nnx.Conv(8, 8, (3,), feature_group_count=8, rngs=nnx.Rngs(0)))
    for batch, message in (
        (jnp.full((2, 8), jnp.nan), "batch 0 has 16 values that are NaN"),
        (jnp.zeros((0, 8)), "batch 0 is empty"),
    ):
        for verb in (stp_jax.compensate, stp_jax.reconstruct):
            with pytest.raises(ValueError, match=message):
                verb(stp, [batch], {"layers.0": 4})
        with pytest.raises(ValueError, match=message):
            stp_jax.correct_bias(stp, [batch])
        with pytest.raises(ValueError, match=message):
            stp_jax.output_divergences(stp, [batch], 4)
    assert stp_jax.budgets(stp) == {"layers.0": 6}
    largest = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6, weight_scale="max")])
    with pytest.raises(ValueError, match="weight_scale='max' follows from the kernel"):
        stp_jax.compensate(stp_jax.quantize(model, largest), [jnp.ones((2, 8))], {"layers.0": 4})
    with pytest.raises(ValueError, match="no quantized layer is dense"):
        stp_jax.compensate(stp_jax.quantize(depthwise, POLICY), [jnp.ones((2, 8, 8))], {})


def test_layers_that_share_a_kernel_are_refused(tmp_path):
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1)))
    model.layers[1].kernel = model.layers[0].kernel
    stp = stp_jax.quantize(model, POLICY)
    stp(jnp.ones((2, 8)))
    for verb in (
        lambda: stp_jax.compensate(stp, [jnp.ones((2, 8))], stp_jax.budgets(stp)),
        lambda: stp_jax.reconstruct(stp, [jnp.ones((2, 8))], stp_jax.budgets(stp)),
        lambda: stp_jax.export.save_packed(stp, tmp_path / "tied.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"'layers.0' and 'layers.1' share one kernel"):
            verb()

"""Float models in one file: exact, whole or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import stp_jax
from stp_jax import models
from stp_jax.export import (
    is_variables,
    load_packed,
    load_variables,
    save_packed,
    save_variables,
)


def resnet(seed, **options):
    return models.create("resnet20", num_classes=4, width=8, rngs=nnx.Rngs(seed), **options)


def values(model):
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def test_every_variable_comes_back_bit_for_bit_statistics_too(tmp_path):
    model, other = resnet(0), resnet(1)
    model(jnp.ones((2, 8, 8, 3)))  # moves the BatchNorm statistics
    save_variables(model, tmp_path / "float.safetensors")
    assert is_variables(tmp_path / "float.safetensors")
    before = values(other)
    assert any((before[path] != v).any() for path, v in values(model).items())
    load_variables(other, tmp_path / "float.safetensors")
    for path, value in values(other).items():
        np.testing.assert_array_equal(value, values(model)[path])


SIZES = {
    "vgg16_bn": {"head": "small", "width": 4},
    "mobilenet_v2": {"width_multiplier": 0.25},
    "efficientnet_lite0": {},
    "vit_s16": {"image_size": 8, "patch_size": 4, "width": 12, "heads": 3, "depth": 2},
    "mlp": {"in_features": 4},
    "lstm_lm": {"embedding": 8, "hidden": 8},
    "decoder_lm": {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 24, "context": 8},
}


@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_of_the_registry_comes_back(name, tmp_path):
    options = SIZES.get(name, {"width": 4})

    def drawn(seed):
        """The model with values drawn by NumPy, which takes no compilation."""
        model = nnx.eval_shape(
            lambda: models.create(name, num_classes=5, rngs=nnx.Rngs(0), **options)
        )
        rng = np.random.default_rng(seed)
        for _, variable in nnx.to_flat_state(nnx.state(model)):
            shape, dtype = variable.get_value().shape, variable.get_value().dtype
            is_key = jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
            value = jax.random.key(seed) if is_key else jnp.asarray(rng.normal(size=shape), dtype)
            variable.set_value(value)
        return model

    model, other = drawn(0), drawn(1)
    save_variables(model, tmp_path / "float.safetensors")
    load_variables(other, tmp_path / "float.safetensors")
    wanted = values(model)
    for path, value in values(other).items():
        if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(value, wanted[path])


def test_a_file_that_does_not_fit_changes_nothing_and_says_why(tmp_path):
    save_variables(resnet(0), tmp_path / "float.safetensors")
    wider = models.create("resnet20", num_classes=4, width=16, rngs=nnx.Rngs(1))
    before = values(wider)
    with pytest.raises(ValueError, match=r"of another shape .*conv1\.kernel"):
        load_variables(wider, tmp_path / "float.safetensors")
    for path, value in values(wider).items():
        np.testing.assert_array_equal(value, before[path])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"pickle", "no safetensors file"), ({}, "hold no|holds no")],
)
def test_other_files_are_refused(content, message, tmp_path):
    path = tmp_path / "other.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"weight": np.zeros(3, np.float32)}, path)
    assert not is_variables(path)
    with pytest.raises(ValueError, match=message):
        load_variables(resnet(0), path)


def test_arrays_that_are_no_variables_belong_to_the_code(tmp_path):
    class Shifted(nnx.Module):
        def __init__(self, seed):
            self.mean = jnp.linspace(0, 1, 8)[None]
            self.head = nnx.Linear(8, 2, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            return self.head(x - self.mean)

    x, model = jnp.ones((1, 8)), Shifted(0)
    save_variables(model, tmp_path / "float.safetensors")
    again = load_variables(Shifted(1), tmp_path / "float.safetensors")
    np.testing.assert_array_equal(again(x), model(x))
    stp = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)]))
    stp_jax.calibrate(stp, [x])
    save_packed(stp, tmp_path / "stp.safetensors")
    np.testing.assert_array_equal(load_packed(Shifted(1), tmp_path / "stp.safetensors")(x), stp(x))

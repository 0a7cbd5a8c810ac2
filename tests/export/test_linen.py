"""Exports of Linen models: packed files, ONNX graphs and jobs for the array, as of NNX models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import export

X = 1.0 + jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
POLICY = stp_jax.Policy([stp_jax.Rule(path="head"), stp_jax.Rule(path=".*", budget=6)])


@pytest.fixture(autouse=True)
def usual_promotion():
    """Flax adds biases of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(8, 12, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@pytest.fixture(scope="module", name="model")
def make_model():
    with jax.numpy_rank_promotion("allow"):
        quantized = stp_jax.quantize(Linen(), POLICY)
        model = quantized.bind(jax.jit(quantized.init)(jax.random.key(0), X))
        stp_jax.calibrate(model, [X])
        return model


def test_a_packed_model_comes_back_bit_for_bit(model, tmp_path):
    export.save_packed(model, tmp_path / "model.safetensors")
    again = export.load_packed(Linen(), tmp_path / "model.safetensors", X)
    np.testing.assert_array_equal(jax.jit(again.__call__)(X), jax.jit(model.__call__)(X))
    assert stp_jax.budgets(again) == {"conv": 6}
    for path, integers in stp_jax.integer_weights(model).items():
        np.testing.assert_array_equal(stp_jax.integer_weights(again)[path], integers)
    assert jax.tree.structure(again.variables) == jax.tree.structure(model.variables)


def test_a_model_that_is_one_layer_comes_back(tmp_path):
    policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    for layer in (nnx.Linear(8, 3, rngs=nnx.Rngs(0)), nn.Dense(3)):
        quantized = stp_jax.quantize(layer, policy)
        inputs = () if isinstance(layer, nnx.Module) else (X,)
        model = quantized.bind(quantized.init(jax.random.key(0), X)) if inputs else quantized
        stp_jax.calibrate(model, [X])
        stp_jax.set_budgets(model, {"": np.array([1, 2, 3])})
        export.save_packed(model, tmp_path / "layer.safetensors")
        again = export.load_packed(layer, tmp_path / "layer.safetensors", *inputs)
        np.testing.assert_array_equal(again(X), model(X))
        np.testing.assert_array_equal(stp_jax.budgets(again)[""], [1, 2, 3])


def test_packed_files_do_not_depend_on_the_api(model, tmp_path):
    """A file of a Linen model is read into its NNX twin."""
    export.save_packed(model, tmp_path / "model.safetensors")
    twin = export.load_packed(NNX(), tmp_path / "model.safetensors")
    twin.eval()
    np.testing.assert_allclose(twin(X), model(X), rtol=1e-5, atol=1e-6)
    assert export.packed_sizes(twin) == export.packed_sizes(model)


def test_wrong_files_and_calls_are_refused(model, tmp_path):
    export.save_packed(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="pass an input"):
        export.load_packed(Linen(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="decides no layer"):
        export.load_packed(nn.Dense(3), tmp_path / "model.safetensors", X)
    with pytest.raises(ValueError, match=r"of another shape.*conv\.kernel"):
        export.load_packed(Linen(), tmp_path / "model.safetensors", X[..., :4])


def test_onnx_computes_the_same(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    export.export_onnx(model, X, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"input": np.asarray(X)})
    np.testing.assert_allclose(logits, model(X), rtol=1e-4, atol=1e-4)


def test_jobs_sum_what_the_layer_sums(model):
    (job,) = export.layer_jobs(model, "conv", X)
    integers = stp_jax.integer_weights(model)["conv"]
    assert (job.budget, job.weights.shape) == (6, (12, 9 * 8))
    np.testing.assert_array_equal(job.weights, integers.reshape(-1, 12).T)
    layer = stp_jax.quantized_layers(model)["conv"]
    scale = np.asarray(layer.scale.reshape(-1) * layer.stored_input_scale)
    sums = (job.activations @ job.weights.T).reshape(2, 6, 6, 12)
    x = layer.format.quantize_input(X, layer.stored_input_scale)
    with jax.default_matmul_precision("highest"):
        expected = nn.Conv(12, (3, 3), use_bias=False).apply(
            {"params": {"kernel": layer.projected()}}, x
        )
    np.testing.assert_allclose(sums * scale, expected, rtol=1e-4, atol=1e-5)
    assert jnp.abs(expected).max() > 0


class NeedsMode(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
        return nn.Dense(4)(nn.relu(x))


def test_keyword_arguments_of_the_call_are_passed_on(tmp_path):
    x = X.mean((1, 2))
    quantized = stp_jax.quantize(NeedsMode(), stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    variables = quantized.init(jax.random.key(0), x, train=False)
    model = quantized.bind(quantized.calibrate(variables, [x], train=False))
    export.save_packed(model, tmp_path / "packed")
    again = export.load_packed(NeedsMode(), tmp_path / "packed", x, train=False)
    np.testing.assert_array_equal(again(x, train=False), model(x, train=False))
    (job,) = export.layer_jobs(model, "Dense_0", x, train=False)
    assert job.weights.shape == (8, 8)
    pytest.importorskip("onnx")
    export.export_onnx(model, x, tmp_path / "model.onnx", train=False)


def test_layers_within_transformations_are_exported_or_named(tmp_path):
    pytest.importorskip("onnx")

    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Dense)(8)(x)

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8)(x)), None

    class Scan(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan()(x, None)[0]

    x = X.mean((1, 2))
    for module in (Remat(), Scan()):
        quantized = stp_jax.quantize(module, stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
        model = quantized.bind(quantized.calibrate(quantized.init(jax.random.key(0), x), [x]))
        if isinstance(module, Remat):
            export.export_onnx(model, x, tmp_path / "model.onnx")
        else:
            with pytest.raises(ValueError, match="a stack of layers"):
                export.export_onnx(model, x, tmp_path / "model.onnx")

    class Jitted(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        @nnx.jit
        def __call__(self, x):
            return self.layer(x)

    model = stp_jax.quantize(Jitted(), stp_jax.Policy([stp_jax.Rule(path=".*", budget=8)]))
    stp_jax.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"inside nnx\.jit, nnx\.remat"):
        export.export_onnx(model, x, tmp_path / "model.onnx")

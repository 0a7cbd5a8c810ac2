"""ONNX graphs: ONNX Runtime computes what the STP model computes, for every kind of layer."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import data, hwmodel, models

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from stp_jax.export import export_onnx  # noqa: E402


def run(path, x, *, fused=True):
    """The runtime's logits; its larger fusions approximate some functions to about 1e-3."""
    options = runtime.SessionOptions()
    # Fused, its products of int8 saturate in 16 bits on processors with AVX2 and no VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not fused:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": np.asarray(x)})[0]


@nnx.jit
def logits(model, x):
    return model(x)


def quantized(model, x, **options):
    """The model with statistics of real activations, its inputs calibrated."""
    model.train()
    for _ in range(30):  # the running statistics keep 0.9 of themselves a step
        logits(model, x)
    model = stp_jax.quantize(model, stp_jax.default_policy(model, **{"budget": 6} | options))
    model.eval()
    stp_jax.calibrate(model, [x])
    return model


MODELS = {
    "mlp": {"in_features": 64, "hidden": (32,)},
    "resnet20": {"in_channels": 1, "width": 4},
    "vit_s16": {
        "in_channels": 1,
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
    },
}


LAST = {"mlp": "layers.2", "resnet20": "linear", "vit_s16": "head"}


@pytest.fixture(scope="module")
def digits():
    return jnp.asarray(next(data.eval_batches(data.load("digits"), batch_size=360))["input"])


@pytest.fixture(scope="module", params=MODELS)
def exported(request, digits, tmp_path_factory):
    """A model that finds many classes, and its file."""
    name = request.param
    float_model = models.create(name, num_classes=10, rngs=nnx.Rngs(0), **MODELS[name])
    model = quantized(float_model, digits)
    last = stp_jax.quantized_layers(model)[LAST[name]].module
    last.bias[...] -= logits(model, digits).mean(axis=0)
    path = tmp_path_factory.mktemp(name) / "m.onnx"
    export_onnx(model, digits, path)
    return model, path


def test_top1_on_digits_is_the_model_s(exported, digits):
    model, path = exported
    ours = np.asarray(logits(model, digits))
    assert len(set(ours.argmax(axis=1))) > 5
    theirs = run(path, digits)
    np.testing.assert_array_equal(theirs.argmax(axis=1), ours.argmax(axis=1))
    # Float sums in another order may round an input to the next integer, in a few images.
    assert np.abs(theirs - ours).mean() < 1e-3 * np.abs(ours).max()


def test_kernels_are_int8_and_layers_keep_their_names(exported, digits):
    model, path = exported
    graph = onnx.load(path).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for layer, integers in stp_jax.integer_weights(model).items():
        kernel = stored[f"{layer}.kernel"]
        assert kernel.dtype == np.int8
        expected = integers.transpose(3, 2, 0, 1) if integers.ndim == 4 else integers
        np.testing.assert_array_equal(kernel, expected)
    read, traced = hwmodel.read_onnx(path), hwmodel.trace(model, digits)
    weights = {(l.name, l.macs) for l in traced if "attn." not in l.name}
    assert weights <= {(layer.name, layer.macs) for layer in read}
    if not any("attn." in name for name in traced.names):
        assert read.links == traced.links


class Everything(nnx.Module):
    """The operations that the models above leave out."""

    def __init__(self, rngs):
        self.table = nnx.Embed(11, 12, rngs=rngs)
        self.conv = nnx.Conv(12, 8, (3, 3), strides=2, padding="SAME", rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.batched = nnx.Einsum("btac,acd->btad", (2, 4, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens)
        x = nnx.relu6(self.norm(self.conv(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = jnp.pad(nnx.silu(self.depthwise(x)), ((0, 0), (0, 0), (0, 1), (0, 0)))
        x = self.heads(x.reshape(x.shape[0], -1, 8))
        first, *rest = jnp.unstack(x, axis=1)
        x = jnp.stack([jnp.tanh(first), *rest], axis=1)
        x = jnp.concatenate(jnp.split(self.batched(x), 2, axis=2)[::-1], axis=2)
        return self.out(jnp.where(x > 0.1, jnp.exp(-x), jnp.clip(x, -0.2, 0.3) ** 3))


def everything(**rule):
    rules = [stp_jax.Rule(path=".*", embeddings=True, **{"budget": 6} | rule)]
    model = stp_jax.quantize(Everything(nnx.Rngs(1)), stp_jax.Policy(rules))
    model.eval()
    return model


TOKENS = jax.random.randint(jax.random.key(0), (3, 8, 8), 0, 11)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"activations": "dynamic", "activation_bits": 5},
        {"activations": "none", "bits": 6, "weight_scale": "max"},
    ],
    ids=str,
)
def test_every_layer_kind_and_format(rule, tmp_path):
    model = everything(**rule)
    stp_jax.calibrate(model, [TOKENS])
    export_onnx(model, TOKENS, tmp_path / "m.onnx")
    theirs = run(tmp_path / "m.onnx", TOKENS, fused=False)
    np.testing.assert_allclose(theirs, model(TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 5])
def test_the_symmetric_range_holds(bits, tmp_path):
    """−128 exists in int8 but not in the model, whose integers end at −127, or before."""
    float_model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    rule = stp_jax.Rule(path=".*", budget=9, activation_bits=bits)
    model = stp_jax.quantize(float_model, stp_jax.Policy([rule]))
    stp_jax.calibrate(model, [jnp.ones((2, 4))])
    x = jnp.asarray([[-300.0, -1.0, 300.0, 0.3]])
    export_onnx(model, x, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), model(x), rtol=1e-6)


def test_a_kernel_that_is_used_twice_is_stored_once(tmp_path):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.fc(nnx.relu(self.fc(x)))

    policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)])
    model = stp_jax.quantize(Twice(nnx.Rngs(0)), policy)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    stp_jax.calibrate(model, [x])
    export_onnx(model, x, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [t.name for t in graph.initializer if t.name.startswith("fc.kernel")] == ["fc.kernel"]
    assert [n.name for n in graph.node if n.op_type == "MatMul"] == ["fc", "fc@2"]
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), model(x), rtol=1e-5, atol=1e-6)


class Sorts(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.sort(self.fc(x))


def test_what_cannot_be_exported_is_named(tmp_path):
    path = tmp_path / "m.onnx"
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="no quantized layer"):
        export_onnx(Sorts(nnx.Rngs(0)), x, path)
    every = lambda **rule: stp_jax.Policy([stp_jax.Rule(path=".*", **rule)])  # noqa: E731
    model = stp_jax.quantize(Sorts(nnx.Rngs(0)), every(budget=6))
    with pytest.raises(ValueError, match="'fc': its input has no scale yet"):
        export_onnx(model, x, path)
    stp_jax.calibrate(model, [x])
    with pytest.raises(ValueError, match="operation 'sort'"):
        export_onnx(model, x, path)
    wide = stp_jax.quantize(Sorts(nnx.Rngs(0)), every(budget=6, bits=10))
    with pytest.raises(ValueError, match="up to 8 bits"):
        export_onnx(wide, x, path)
    half = stp_jax.quantize(nnx.Linear(4, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), every(budget=6))
    stp_jax.calibrate(half, [x])
    with pytest.raises(ValueError, match="bfloat16"):
        export_onnx(half, x, path)
    assert not path.exists()


def test_the_package_is_asked_for_when_it_is_missing():
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from stp_jax.export import export_onnx\n"
        "export_onnx(None, None, 'm.onnx')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "export_onnx needs the onnx package: pip install 'stp-jax[onnx]'" in done.stderr

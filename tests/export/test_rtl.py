"""Jobs for the test bench: what the array sums is what the layer sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax.export.rtl import layer_jobs, write_layer_images
from stp_jax.hwmodel.rtl import icarus_available, simulate_array
from stp_jax.hwmodel.rtl.images import wire_slots


class Small(nnx.Module):
    def __init__(self, rngs):
        self.dense_conv = nnx.Conv(3, 12, (3, 3), strides=2, padding="SAME", rngs=rngs)
        self.grouped = nnx.Conv(
            12, 6, (3, 1), feature_group_count=2, kernel_dilation=(2, 1), rngs=rngs
        )
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(6 * 2 * 2, 5, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.dense_conv(x))
        x = self.depthwise(self.grouped(x))
        return self.fc(x.reshape(len(x), -1))


X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))


def small(**rule):
    model = stp_jax.quantize(
        Small(nnx.Rngs(0)), stp_jax.Policy([stp_jax.Rule(path=".*", **{"budget": 6} | rule)])
    )
    stp_jax.calibrate(model, [X])
    model.unused.promote_dtype.activation_scale[...] = jnp.float32(1)
    return model


def layer_sums(model, layer):
    """The layer's output in units of both scales, without its bias."""
    integer = stp_jax.integer_model(model)
    quantized = stp_jax.quantized_layers(model)[layer]
    seen = []
    hook = quantized.layer.product
    target = getattr(integer, layer)
    product = getattr(target, hook)

    def recorded(*args, **kwargs):
        seen.append(product(*args, **kwargs))
        return seen[-1]

    setattr(target, hook, nnx.static(recorded))
    integer(X)
    scale = quantized.scale.reshape(-1) * quantized.stored_input_scale
    out = np.asarray(seen[0], np.float64)
    return out.reshape(-1, out.shape[-1]) / np.asarray(scale, np.float64)


@pytest.mark.parametrize(
    ("layer", "jobs", "depth"),
    # K: positions times channels, each run filled up to groups of eight.
    [("dense_conv", 1, 9 * 8), ("grouped", 2, 3 * 8), ("depthwise", 6, 16), ("fc", 1, 24)],
)
def test_jobs_sum_what_the_layer_sums(layer, jobs, depth):
    model = small()
    found = layer_jobs(model, layer, X)
    assert (len(found), found[0].weights.shape[1]) == (jobs, depth)
    sums = np.concatenate([job.activations @ job.weights.T for job in found], axis=1)
    np.testing.assert_allclose(sums, layer_sums(model, layer), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layer", ["dense_conv", "grouped", "depthwise", "fc"])
def test_groups_are_those_of_training(layer):
    """Every group of consecutive weights fits the slots, which other groupings would not."""
    model = small()
    for job in layer_jobs(model, layer, X):
        wire_slots(job.weights.reshape(-1, 8), job.budget)


@pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")
@pytest.mark.parametrize("layer", ["fc", "grouped"])
def test_the_array_computes_filters_with_budgets_of_their_own(layer):
    model = small()
    filters = stp_jax.quantized_layers(model)[layer].filter_count
    budgets = np.arange(filters)  # a filter without a term takes a slot as well
    stp_jax.set_budgets(model, {layer: budgets})
    jobs = layer_jobs(model, layer, X)
    np.testing.assert_array_equal(np.concatenate([j.budget for j in jobs]), np.maximum(budgets, 1))
    results = simulate_array(jobs, rows=2, cols=3, group_size=8)
    for job, result in zip(jobs, results, strict=True):
        np.testing.assert_array_equal(result.outputs, job.activations @ job.weights.T)
    report = stp_jax.evaluate_model(model, X, rows=2, cols=3).report
    cycles = sum(result.cycles for result in results)
    assert cycles == report.cycles[report.network.names.index(layer)]


@pytest.mark.skipif(not icarus_available(), reason="Icarus Verilog is not installed")
def test_the_array_computes_a_trained_layer():
    model = small()
    jobs = layer_jobs(model, "depthwise", X)
    for job, result in zip(jobs, simulate_array(jobs, rows=2, cols=3, group_size=8), strict=True):
        np.testing.assert_array_equal(result.outputs, job.activations @ job.weights.T)


@pytest.mark.parametrize("at_edge", [False, True])
def test_images_are_written(at_edge, tmp_path):
    folder = tmp_path / "new" / "images"
    words = write_layer_images(small(), "fc", X, folder, rows=2, cols=2, encode_at_edge=at_edge)
    name, parameter = ("weights", "WEIGHT_WORDS") if at_edge else ("wire_slots", "SLOT_WORDS")
    lines = (folder / f"{name}.hex").read_text().split()
    groups = 2 * 5 * 2  # two row folds of two rows, five filters
    assert len(lines) == words[parameter] == groups * (1 if at_edge else 6)
    assert words["OUTPUT_WORDS"] == 2 * 5


@pytest.mark.parametrize(
    ("layer", "rule", "message"),
    [
        ("conv9", {}, "no quantized layer at 'conv9'; there are: dense_conv"),
        ("unused", {}, "does not use layer 'unused'"),
        ("fc", {"encoding": "booth4", "budget": 9}, "NAF terms of 8-bit weights"),
        ("fc", {"bits": 9}, "NAF terms of 8-bit weights"),
        ("fc", {"budget": 0}, "leaves nothing to compute"),
    ],
)
def test_what_the_array_cannot_take_is_refused(layer, rule, message):
    with pytest.raises(ValueError, match=message):
        layer_jobs(small(**rule), layer, X)

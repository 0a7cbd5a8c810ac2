"""Sensitivity: errors and gradients that the budget allocator weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule, models

X = jax.random.normal(jax.random.key(1), (3, 12))


def build(layer=None, **rule):
    rule = {"budget": 7, "activations": "none", "weight_scale": "max", **rule}
    layer = layer or nnx.Linear(12, 4, use_bias=False, rngs=nnx.Rngs(0))
    return stp_jax.quantize(layer, Policy([Rule(path=".*", **rule)]))


def test_curves_are_the_projected_kernels_errors():
    model = build(bits=5, group_size=4)
    kernel = np.asarray(model.kernel[...])
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2.0, kernel.shape), jnp.float32)
    # The projection of the call is unweighted: compare under equal weights, then scale them.
    plain = stp_jax.error_curves(model)[""]
    twice = stp_jax.error_curves(model, importance={"": jnp.full_like(weights, 2.0)})[""]
    np.testing.assert_allclose(twice, 2 * plain, rtol=1e-5)
    assert len(plain) == model.promote_dtype.format.rule.format.max_budget + 1
    for budget in (0, 3, 7, len(plain) - 1):
        projected = stp_jax.project_params(model, {"": budget})["kernel"][...]
        error = float(np.sum((np.asarray(projected) - kernel) ** 2))
        assert plain[budget] == pytest.approx(error, rel=1e-4, abs=1e-6)
    weighted = stp_jax.error_curves(model, importance={"": weights})[""]
    assert weighted[0] == pytest.approx(float(jnp.sum(weights * kernel**2)), rel=1e-5)
    assert np.all(np.diff(weighted) <= 1e-6)


@pytest.mark.parametrize(
    ("layer", "groups"),
    [
        (lambda rngs: nnx.Linear(12, 4, rngs=rngs), 2 * 4),  # 12 inputs: 8 and a ragged 4
        (lambda rngs: nnx.Conv(16, 3, (3, 3), rngs=rngs), 9 * 2 * 3),
        (lambda rngs: nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs), 2 * 6),
    ],
)
def test_group_counts(layer, groups):
    assert stp_jax.group_counts(build(layer(nnx.Rngs(0)))) == {"": groups}


def test_squared_gradients_are_means_over_batches():
    model = build()
    batches = [X, 2 * X, -X]

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    found = stp_jax.squared_gradients(model, loss, batches)[""]
    # Straight through: d sum(sin(x q)) / dq at the quantized kernel q.
    q = np.asarray(stp_jax.project_params(model)["kernel"][...])
    by_hand = [(np.asarray(x).T @ np.cos(np.asarray(x) @ q)) ** 2 for x in batches]
    np.testing.assert_allclose(found, np.mean(by_hand, axis=0), rtol=1e-4, atol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="encoding naf, method optimal"):
        stp_jax.error_curves(build(encoding="booth4"))
    with pytest.raises(ValueError, match="encoding naf, method optimal"):
        stp_jax.error_curves(build(method="greedy"))
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.squared_gradients(build(), lambda model, x: jnp.sum(model(x)), [])


def logits_model():
    model = models.create("mlp", num_classes=5, rngs=nnx.Rngs(1), in_features=16, hidden=(16, 8))
    stp = stp_jax.quantize(model, stp_jax.Policy([stp_jax.Rule(path=".*", budget=32)]))
    batches = [jax.random.normal(jax.random.key(i), (32, 16)) for i in range(2)]
    stp_jax.calibrate(stp, batches)
    return stp, batches


def test_outputs_diverge_where_a_layer_is_projected_and_nowhere_else():
    stp, batches = logits_model()
    before = [stp(x) for x in batches]
    whole = stp_jax.output_divergences(stp, batches, 32)
    few = stp_jax.output_divergences(stp, batches, 1)
    assert list(whole) == list(few) == list(stp_jax.budgets(stp))
    for path in whole:
        assert whole[path] == pytest.approx(0, abs=1e-6)
        assert few[path] > 1e-3
    for x, y in zip(batches, before, strict=True):
        np.testing.assert_array_equal(stp(x), y)


def test_a_divergence_is_that_of_the_model_with_this_layer_projected():
    stp, batches = logits_model()
    path = next(iter(stp_jax.budgets(stp)))
    found = stp_jax.output_divergences(stp, batches, {p: 2 for p in stp_jax.budgets(stp)})[path]
    changed = nnx.clone(stp)
    stp_jax.set_budgets(changed, {path: 2})
    stp_jax.quantized_layers(changed)[path].search_scale(None)
    p, q = (np.concatenate([jax.nn.log_softmax(m(x)) for x in batches]) for m in (stp, changed))
    assert found == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), rel=1e-4)


def test_the_weighted_error_of_a_layer_is_its_divergence():
    stp, batches = logits_model()
    importance = stp_jax.measured_importance(stp, batches, 2)
    divergences = stp_jax.output_divergences(stp, batches, 2)
    probe = nnx.clone(stp)
    stp_jax.set_budgets(probe, dict.fromkeys(divergences, 2))
    for path, layer in stp_jax.quantized_layers(probe).items():
        layer.search_scale(None)
        error = jnp.sum(importance[path] * (layer.projected() - layer.kernel) ** 2)
        assert float(error) == pytest.approx(divergences[path], rel=1e-3)
    stp_jax.allocate(stp, 0.5, importance=importance, by="filter")


def test_sensitivity_needs_batches():
    stp, batches = logits_model()
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.output_divergences(stp, [], 2)
    with pytest.raises(TypeError, match="list of batches"):
        stp_jax.output_divergences(stp, batches[0], 2)


def test_the_divergence_from_a_reference_sees_all_layers():
    stp, batches = logits_model()
    changed = nnx.clone(stp)
    path = next(iter(stp_jax.budgets(stp)))
    stp_jax.set_budgets(changed, {path: 2})
    stp_jax.quantized_layers(changed)[path].search_scale(None)
    alone = stp_jax.output_divergences(stp, batches, 2)[path]
    assert stp_jax.output_divergence(changed, stp, batches) == pytest.approx(alone, rel=1e-4)
    assert stp_jax.output_divergence(stp, stp, batches) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.output_divergence(stp, stp, [])
    with pytest.raises(TypeError, match="list of batches"):
        stp_jax.output_divergence(stp, stp, batches[0])


def test_relative_errors_do_not_depend_on_the_size_of_a_layers_weights():
    float_model = models.create(
        "mlp", num_classes=5, rngs=nnx.Rngs(1), in_features=16, hidden=(16, 8)
    )
    stp = stp_jax.quantize(float_model, Policy([Rule(path=".*", budget=8, weight_scale="max")]))
    path = next(iter(stp_jax.budgets(stp)))
    larger = nnx.clone(stp)
    modules = {".".join(map(str, name)): module for name, module in nnx.iter_modules(larger)}
    modules[path].kernel[...] *= 4.0

    def allocated(model):
        importance = stp_jax.relative_importance(model)
        curves = stp_jax.error_curves(model, importance=importance)
        for name, layer in stp_jax.quantized_layers(model).items():
            assert curves[name][0] == pytest.approx(layer.kernel.size, rel=1e-5)
        return stp_jax.allocate(model, 0.5, importance=importance, by="filter")

    before, after = allocated(stp), allocated(larger)
    for name, budget in before.items():
        np.testing.assert_array_equal(after[name], budget)
    assert np.mean(stp_jax.allocate(larger, 0.5, by="filter")[path]) > np.mean(after[path])

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
    pruned = nnx.clone(stp)
    stp_jax.set_budgets(pruned, 3)
    assert stp_jax.output_divergences(pruned, batches, 32) == pytest.approx(whole, abs=1e-6)
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


def normed_model(seed=0, *, factor=1.0):
    """A convolution before a BatchNorm, its kernel multiplied, and a classifier."""
    rngs = nnx.Rngs(seed)
    conv, norm = nnx.Conv(4, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    conv.kernel[...] *= factor
    model = nnx.Sequential(
        conv, norm, nnx.relu, lambda x: x.mean((1, 2)), nnx.Linear(8, 5, rngs=rngs)
    )
    batches = [jax.random.normal(jax.random.key(i), (16, 6, 6, 4)) for i in range(2)]
    model(batches[0])  # running statistics, which have seen little
    model.eval()
    stp = stp_jax.quantize(model, Policy([Rule(path=".*", budget=32, weight_scale="max")]))
    stp_jax.calibrate(stp, batches)
    return stp, batches


def test_batch_norms_forgive_what_their_statistics_can_repair():
    stp, batches = normed_model()
    path = next(iter(stp_jax.budgets(stp)))
    found, running = (
        stp_jax.output_divergences(stp, batches, 2, batch_statistics=own)[path]
        for own in (True, False)
    )
    changed = nnx.clone(stp)
    stp_jax.set_budgets(changed, {path: 2})
    stp_jax.quantized_layers(changed)[path].search_scale(None)
    for batch_statistics, expected in ((True, found), (False, running)):
        each = []
        for x in batches:
            p, q = (nnx.clone(model) for model in (stp, changed))
            if batch_statistics:
                p.train()
                q.train()
            log_p, log_q = (jax.nn.log_softmax(model(x)) for model in (p, q))
            each.append(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)))
        assert expected == pytest.approx(float(np.mean(each)), rel=1e-3)
    assert found != pytest.approx(running, rel=0.1)


def test_allocation_by_divergence_does_not_depend_on_the_size_of_weights_before_a_norm():
    spent = []
    for factor in (1.0, 16.0):
        stp, batches = normed_model(factor=factor)
        plain = stp_jax.allocate(stp, 0.5, by="filter")
        found = stp_jax.allocate_by_divergence(stp, 0.5, batches)
        spent.append([np.sum(budget) for budgets in (found, plain) for budget in budgets.values()])
        groups = stp_jax.group_counts(stp)
        kernels = {p: layer.kernel for p, layer in stp_jax.quantized_layers(stp).items()}
        terms = sum(np.sum(k) * groups[p] / len(k) for p, k in found.items())
        assert terms <= 0.5 * sum(kernel.size for kernel in kernels.values())
    assert np.allclose(spent[0][:2], spent[1][:2], atol=2)
    assert not np.allclose(spent[0][2:], spent[1][2:], atol=2)  # plain errors do depend on it


def test_allocation_by_divergence_leaves_outputs_nearer_than_plain_errors_do():
    stp, batches = normed_model(factor=16.0)

    def divergence(chosen):
        projected = nnx.clone(stp)
        stp_jax.set_budgets(projected, chosen)
        stp_jax.search_weight_scales(projected)
        both = [nnx.clone(model) for model in (projected, stp)]
        for model in both:
            model.train()
        return stp_jax.output_divergence(*both, batches)

    plain = divergence(stp_jax.allocate(stp, 0.5, by="filter"))
    by_outputs = [
        divergence(stp_jax.allocate_by_divergence(stp, 0.5, batches, by=by, rounds=rounds))
        for by, rounds in (("filter", 1), ("filter", 3), ("layer", 2))
    ]
    assert max(by_outputs) < 0.7 * plain


def test_budgets_of_any_shape_are_measured_by_one_program():
    stp, batches = logits_model()
    traced = []

    def call(model, x):
        traced.append(x.shape)
        return model(x)

    stp_jax.allocate_by_divergence(stp, 0.5, batches, call=call)
    assert len(traced) == 1


@pytest.mark.parametrize("by", ["layer", "filter"])
def test_allocations_in_steps_are_multiples_within_the_total(by):
    stp, batches = logits_model()
    for allocate in (
        lambda **options: stp_jax.allocate(stp, 0.75, by=by, **options),
        lambda **options: stp_jax.allocate_by_divergence(stp, 0.75, batches, by=by, **options),
    ):
        found = allocate(step=2)
        costs = stp_jax.term_costs(stp)
        assert all((np.asarray(k) % 2 == 0).all() and np.min(k) >= 2 for k in found.values())
        assert sum(costs[path] * np.mean(k) for path, k in found.items()) <= 0.75 + 1e-9
        assert any(np.any(found[path] != k) for path, k in allocate().items())
    with pytest.raises(ValueError, match="does not reach the minimum budget 8"):
        stp_jax.allocate_by_divergence(stp, 0.75, batches, step=8)


def test_layers_without_error_or_cost_do_not_stop_an_allocation():
    stp, batches = logits_model()
    first, *others = stp_jax.budgets(stp)
    modules = {".".join(map(str, name)): module for name, module in nnx.iter_modules(stp)}
    modules[first].kernel[...] = 0.0
    whole = stp_jax.allocate_by_divergence(stp, 0.75, batches)
    assert set(whole) == {first, *others}
    costs = {path: 1.0 for path in others}
    found = stp_jax.allocate_by_divergence(stp, 5.0, batches, costs=costs, by="layer")
    assert set(found) == set(others) and sum(found.values()) <= 5


def test_allocation_by_divergence_refuses_before_it_measures():
    stp, batches = logits_model()

    def untouched():
        raise AssertionError("batches were read")
        yield

    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        stp_jax.allocate_by_divergence(stp, 0.5, untouched(), rounds=0)
    with pytest.raises(ValueError, match="by must be one of layer, filter"):
        stp_jax.allocate_by_divergence(stp, 0.5, untouched(), by="row")
    with pytest.raises(ValueError, match="costs name no quantized layer: absent"):
        stp_jax.allocate_by_divergence(stp, 0.5, untouched(), costs={"absent": 1.0})
    with pytest.raises(ValueError, match="at least one batch"):
        stp_jax.allocate_by_divergence(stp, 0.5, [])
    with pytest.raises(TypeError, match="list of batches"):
        stp_jax.allocate_by_divergence(stp, 0.5, batches[0])

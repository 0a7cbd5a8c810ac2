"""Costs of models on the accelerator, and the budgets that a total of them buys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stp_jax
from stp_jax import Policy, Rule, hwmodel, models

IMAGE = jnp.zeros((1, 8, 8, 16))


class Net(nnx.Module):
    """A convolution of many uses and a large dense layer of one."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(16, 64, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.conv(x).mean(axis=(1, 2)))


def build():
    return stp_jax.quantize(Net(nnx.Rngs(0)), Policy([Rule(path=".*", budget=8)]))


def test_costs_are_shares_of_one_term_per_weight():
    model = build()
    groups = {"conv": 9 * 2 * 16, "fc": 2 * 64}
    weights = sum(groups.values()) * 8
    costs = stp_jax.term_costs(model)
    assert costs == pytest.approx({path: n / weights for path, n in groups.items()})
    # 8 terms in every group of 8 are one term per weight, whatever is counted.
    for per in ("terms", "cycles", "energy", "balanced"):
        costs = stp_jax.term_costs(model, IMAGE, per=per)
        assert sum(8 * cost for cost in costs.values()) == pytest.approx(1.0)


def test_energy_counts_each_use_and_cycles_are_the_arrays():
    model = build()
    energy = stp_jax.term_costs(model, IMAGE, per="energy")
    assert energy["conv"] / energy["fc"] == pytest.approx(9 * 2 * 16 * 64 / (2 * 64))
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8, grouping="channels"))
    network = hwmodel.trace(model, IMAGE)
    more, less = (hwmodel.evaluate(network, array, budgets=k).cycles for k in (6, 5))
    cycles = stp_jax.term_costs(model, IMAGE, per="cycles", array=array)
    assert cycles["conv"] / cycles["fc"] == pytest.approx(
        (more - less)[network.names.index("conv")] / (more - less)[network.names.index("fc")]
    )
    both = stp_jax.term_costs(model, IMAGE, per="balanced")
    terms = stp_jax.term_costs(model)
    assert both["fc"] == pytest.approx((energy["fc"] + terms["fc"]) / 2)


def test_pes_of_several_lanes_have_costs_by_their_cycles():
    model = build()
    pe = hwmodel.GroupPE(group_size=8, grouping="channels")
    one = hwmodel.Array(rows=4, cols=4, pe=pe)
    two = dataclasses.replace(one, pe=dataclasses.replace(pe, lanes=2))
    costs = [stp_jax.term_costs(model, IMAGE, per="cycles", array=a) for a in (one, two)]
    assert costs[1] == pytest.approx(costs[0])  # shares of a total that is halved with the cycles
    starved = dataclasses.replace(two, dram_bandwidth=1e-6)
    with pytest.raises(ValueError, match="its memory limits it"):
        stp_jax.term_costs(model, IMAGE, per="cycles", array=starved)


def test_allocation_keeps_to_its_total_and_beats_uniform_budgets():
    model = build()
    weight = {"conv": jnp.full((3, 3, 16, 16), 5.0), "fc": jnp.ones((16, 64))}
    curves = stp_jax.error_curves(model, importance=weight)
    for per in ("terms", "energy"):
        costs = stp_jax.term_costs(model, IMAGE, per=per)
        budgets = stp_jax.allocate(model, 0.75, costs=costs, importance=weight)
        assert sum(costs[path] * k for path, k in budgets.items()) <= 0.75 * (1 + 1e-9)
        error = sum(curves[path][k] for path, k in budgets.items())
        assert error <= sum(curve[6] for curve in curves.values())


def test_bad_requests_are_refused():
    model = build()
    with pytest.raises(ValueError, match="per must be one of terms, cycles, energy, balanced"):
        stp_jax.term_costs(model, per="watts")
    with pytest.raises(ValueError, match="'energy' needs an example input"):
        stp_jax.term_costs(model, per="energy")
    with pytest.raises(ValueError, match="costs name no quantized layer: head"):
        stp_jax.allocate(model, 1.0, costs={"head": 1.0})
    with pytest.raises(ValueError, match="importance lacks the layers fc"):
        stp_jax.allocate(model, 1.0, importance={"conv": jnp.ones((3, 3, 16, 16))})


def test_relaxed_budgets_train_and_become_whole_again():
    model = build()
    before = jax.tree.map(np.asarray, model(IMAGE + 1.0))
    stp_jax.relax_budgets(model)
    assert stp_jax.budgets(model) == {"conv": 8.0, "fc": 8.0}
    np.testing.assert_array_equal(model(IMAGE + 1.0), before)
    with pytest.raises(ValueError, match="relaxed; set_budgets makes them whole"):
        stp_jax.integer_weights(model)
    graphdef, budgets, rest = nnx.split(model, stp_jax.RelaxedBudget, ...)

    def loss(budgets):
        model = nnx.merge(graphdef, budgets, rest, copy=True)
        priced = stp_jax.relaxed_budgets(model)
        return jnp.sum(model(IMAGE + 1.0)), sum(priced.values())

    grads = jax.grad(lambda b: loss(b)[0])(budgets)
    step = jax.tree.map(lambda b: b + 1.0, budgets)
    # Between whole budgets kernels are linear in theirs, and so is the last layer's output.
    only_fc = jax.tree.map(lambda x: x, budgets)
    only_fc["fc"] = step["fc"]
    change = float(loss(only_fc)[0] - loss(budgets)[0])
    assert float(jax.tree.leaves(grads["fc"])[0]) == pytest.approx(change, rel=1e-3, abs=1e-3)
    assert float(loss(budgets)[1]) == 16.0
    stp_jax.set_budgets(model, 5)
    assert stp_jax.budgets(model) == {"conv": 5, "fc": 5}
    assert isinstance(model.fc.promote_dtype.budget, stp_jax.Budget)
    with pytest.raises(ValueError, match="no relaxed budget"):
        stp_jax.relaxed_budgets(model)


def test_a_model_s_cost_is_that_of_its_integers_in_its_own_groups():
    model = nnx.Sequential(nnx.Conv(12, 8, (3, 3), rngs=nnx.Rngs(0)))
    model = stp_jax.quantize(model, Policy([Rule(path=".*", budget=5, activations="none")]))
    x = jnp.zeros((1, 6, 6, 12))  # twelve channels: a ragged group at every window position
    cost = stp_jax.evaluate_model(model, x, rows=4, cols=4)
    pe = hwmodel.GroupPE(group_size=8, grouping="channels")
    by_hand = hwmodel.evaluate(
        hwmodel.trace(model, x),
        hwmodel.Array(rows=4, cols=4, pe=pe),
        budgets={"layers.0": 5},
        weights=stp_jax.integer_weights(model),
    )
    assert cost.report.total_cycles == by_hand.total_cycles
    assert cost.report.total_energy_pj == pytest.approx(by_hand.total_energy_pj)
    assert cost.saving == pytest.approx(hwmodel.computational_saving(cost.baseline, by_hand))
    assert cost.saving_with_encoder < cost.saving


def test_outputs_that_stay_on_the_chip_leave_the_traffic_of_both_arrays():
    """The convolution writes 8 x 8 x 16 bytes, of which the dense layer reads the mean of 16."""
    off, on = (stp_jax.evaluate_model(build(), IMAGE, activation_sram=n) for n in (0, 8 * 8 * 16))
    for before, after in ((off.baseline, on.baseline), (off.report, on.report)):
        assert (before.dram_bytes - after.dram_bytes).tolist() == [8 * 8 * 16, 16]


def test_one_array_runs_one_kind_of_group():
    rules = [Rule(path="conv", budget=4, group_size=4), Rule(path="fc", budget=8)]
    model = stp_jax.quantize(Net(nnx.Rngs(0)), Policy(rules))
    with pytest.raises(ValueError, match=r"groups of 4 naf .*'conv'.*groups of 8 naf .*'fc'"):
        stp_jax.evaluate_model(model, IMAGE)
    int8 = stp_jax.quantize(Net(nnx.Rngs(0)), Policy([Rule(path=".*")]))
    with pytest.raises(ValueError, match="no layer of the model has a budget"):
        stp_jax.group_pe(int8)


@pytest.mark.parametrize(
    ("equation", "shape", "channels"),
    [
        ("btd,ndh->btnh", (4, 16, 8), 16),  # heads first, as in Gemma's queries
        ("btd,sndh->sbtnh", (3, 2, 16, 8), 16),
        ("btd,hd->bth", (24, 16), 16),
    ],
)
def test_einsums_are_counted_wherever_their_reduction_lies(equation, shape, channels):
    einsum = nnx.Einsum(equation, shape, rngs=nnx.Rngs(0))
    model = stp_jax.quantize(einsum, stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)]))
    x = jnp.ones((2, 3, channels))
    cost = stp_jax.evaluate_model(model, x)
    integers = next(iter(stp_jax.integer_weights(model).values()))
    held = np.asarray(stp_jax.terms.count(integers)).sum()
    assert cost.report.operations["terms"].sum() == held * 2 * 3


def test_einsums_with_a_product_for_each_head_are_counted():
    einsum = nnx.Einsum("btnd,ndh->btnh", (4, 16, 8), rngs=nnx.Rngs(0))
    model = stp_jax.quantize(einsum, stp_jax.Policy([stp_jax.Rule(path=".*", budget=6)]))
    cost = stp_jax.evaluate_model(model, jnp.ones((2, 3, 4, 16)))
    integers = next(iter(stp_jax.integer_weights(model).values()))
    held = np.asarray(stp_jax.terms.count(integers)).sum()
    assert cost.report.operations["terms"].sum() == held * 2 * 3


def test_a_tied_embedding_has_a_budget_and_its_cost():
    sizes = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "hidden": 16, "context": 8}
    model = models.create("decoder_lm", num_classes=40, rngs=nnx.Rngs(0), **sizes)
    policy = stp_jax.default_policy(model, budget=2, embeddings=True)
    model, tokens = stp_jax.quantize(model, policy), jnp.zeros((3, 6), jnp.int32)
    calibrated = nnx.clone(model)
    stp_jax.calibrate(calibrated, [tokens])
    cost = stp_jax.evaluate_model(calibrated, tokens)
    head = hwmodel.Network(cost.network.layers[-1:])
    table = stp_jax.integer_weights(calibrated)["embed"]
    alone = hwmodel.evaluate(
        head,
        hwmodel.Array(rows=32, cols=32, pe=stp_jax.group_pe(model)),
        budgets={"embed": 2},
        weights={"embed": table.T},
    )
    assert float(cost.report.cycles[-1]) == alone.total_cycles
    assert float(cost.report.energy_pj["array"][-1]) == pytest.approx(alone.energy_pj["array"][0])
    shares = stp_jax.term_costs(model, tokens, per="terms")
    assert shares["embed"] / shares["blocks.0.feed_forward.up"] == 40 / 16


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolutions_cost_what_their_terms_do(stride, transpose_kernel):
    layer = nnx.ConvTranspose(
        16, 4, (2, 3), strides=stride, transpose_kernel=transpose_kernel, rngs=nnx.Rngs(0)
    )
    model = nnx.Sequential(nnx.Conv(3, 16, (1, 1), rngs=nnx.Rngs(1)), layer)
    rule = stp_jax.Rule(path=".*", budget=8, group_size=8)
    stp = stp_jax.quantize(model, stp_jax.Policy([rule]))
    x = jnp.zeros((1, 4, 4, 3))
    k = np.array([1, 5, 2, 7])
    stp_jax.set_budgets(stp, {"layers.0": 8, "layers.1": k})
    cost = stp_jax.evaluate_model(stp, x, rows=1, cols=1)
    # Two groups of 8 channels hold their budget at most, at every pixel and position.
    pixels, positions = 16, 6
    assert float(cost.report.operations["terms"][1]) <= pixels * positions * 2 * k.sum()
    stp_jax.set_budgets(stp, {"layers.0": 8, "layers.1": 7})
    assert cost.report.cycles[1] < stp_jax.evaluate_model(stp, x, rows=1, cols=1).report.cycles[1]


def test_a_layer_may_be_called_model():
    class Wrapped(nnx.Module):
        def __init__(self):
            self.model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.model(x)

    stp = stp_jax.quantize(Wrapped(), Policy([Rule(path=".*", budget=4)]))
    cost = stp_jax.evaluate_model(stp, jnp.ones((1, 64)))
    assert dict(cost.budgets) == {"model": 4}
    assert set(stp_jax.term_costs(stp, jnp.ones((1, 64)), per="cycles")) == {"model"}


@pytest.mark.parametrize("equation", ["bhd,hdk->bhk", "bhd,dkh->bhk"])
def test_budgets_by_filter_of_an_einsum_follow_its_products(equation):
    extents = {"h": 3, "d": 16, "k": 5}
    kernel = tuple(extents[letter] for letter in equation.split("->")[0].split(",")[1])
    model = nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0))
    stp = stp_jax.quantize(model, Policy([Rule(path=".*", budget=8)]))
    stp_jax.set_budgets(stp, stp_jax.allocate(stp, 0.5, by="filter"))
    cost = stp_jax.evaluate_model(stp, jnp.ones((2, 3, 16)))
    (budgets,) = cost.budgets.values()
    by_product = budgets.reshape(3, 5)
    held = stp_jax.weight_terms(stp)[""]
    held = held if equation.endswith("hdk->bhk") else held.transpose(2, 0, 1)
    groups = held.reshape(3, 2, 8, 5).sum(axis=2)  # [h, groups, k]
    assert (groups <= by_product[:, None]).all() and (groups.max(1) == by_product).mean() > 0.9

"""Policies: every rule decides a layer, and the layers that were meant keep all terms."""

import jax.numpy as jnp
import pytest
from flax import nnx

import stp_jax
from stp_jax import hwmodel, models
from stp_jax.models.registry import MODELS, model_options

# Model → options, and the layers that keep all terms.
CASES = {
    "resnet18": ({}, {"conv1", "fc"}),
    "resnet34": ({"stem": "small"}, {"conv1", "fc"}),
    "resnet20": ({}, {"conv1", "linear"}),
    "resnet32": ({}, {"conv1", "linear"}),
    "resnet44": ({}, {"conv1", "linear"}),
    "resnet56": ({}, {"conv1", "linear"}),
    "vgg16_bn": ({}, {"features.0", "classifier.6"}),
    "mlp": ({"in_features": 64, "hidden": (8, 8, 8)}, {"layers.6"}),
    "vit_s16": ({"depth": 2}, {"patch_embed.proj", "head"}),
    "lstm_lm": ({}, {"decoder"}),
}


def abstract(name, **options):
    return nnx.eval_shape(lambda: models.create(name, num_classes=9, rngs=nnx.Rngs(0), **options))


def budgeted(model, policy):
    paths = stp_jax.kernel_paths(model)
    return {path for path in paths if policy.find(path).budget is not None}


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_decides_a_layer_of_every_model(name):
    model = abstract(name, **({"in_features": 64} if name == "mlp" else {}))
    policy = stp_jax.default_policy(model, budget=6)
    policy.check(stp_jax.kernel_paths(model))
    assert [rule.budget for rule in policy.rules] == ([None, 6] if model.exempt_layers else [6])


@pytest.mark.parametrize("name", CASES)
def test_the_layers_that_were_meant_keep_all_terms(name):
    options, spared = CASES[name]
    model = abstract(name, **options)
    policy = stp_jax.default_policy(model, budget=6)
    assert set(stp_jax.kernel_paths(model)) - budgeted(model, policy) == spared


def test_small_heads_have_their_last_layer_elsewhere():
    model = abstract("vgg16_bn", head="small")
    assert stp_jax.default_policy(model, budget=6).find("classifier.0").budget is None


@pytest.mark.parametrize(
    ("name", "convolutions"),
    # One depthwise convolution a block: 17 blocks in MobileNetV2's table 2, 16 in EfficientNet-B0's
    # table 1.
    [("mobilenet_v2", 17), ("efficientnet_lite0", 16)],
)
def test_depthwise_convolutions_keep_all_terms(name, convolutions):
    model = abstract(name)
    network = hwmodel.trace(model, jnp.zeros((1, 64, 64, 3)))
    depthwise = {layer.name for layer in network if layer.groups > 1}
    spared = set(stp_jax.kernel_paths(model)) - budgeted(
        model, stp_jax.default_policy(model, budget=6)
    )
    assert len(depthwise) == convolutions
    assert depthwise == {path for path in spared if path in depthwise}
    assert len(spared) == convolutions + 2  # the first and the last layer


def test_the_format_reaches_both_rules():
    options = {"group_size": 4, "encoding": "hese", "method": "greedy", "activation_bits": 6}
    policy = stp_jax.default_policy(abstract("resnet20"), budget=3, **options)
    for rule in policy.rules:
        assert {key: getattr(rule, key) for key in options} == options


def test_other_layers_can_be_spared():
    policy = stp_jax.default_policy(abstract("resnet20"), budget=6, exempt="layer1\\..*")
    assert policy.find("conv1").budget == 6
    assert policy.find("layer1.0.conv1").budget is None


def test_a_model_of_one_s_own_names_its_exempt_layers():
    class Net(nnx.Module):
        exempt_layers = ("head",)

    rules = stp_jax.default_policy(Net(), budget=6).rules
    assert [(rule.path, rule.budget) for rule in rules] == [("head", None), (".*", 6)]
    with pytest.raises(ValueError, match="Linear does not say which layers are exempt"):
        stp_jax.default_policy(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), budget=6)


def test_options_are_those_of_the_constructor():
    assert model_options("mobilenet_v2")["width_multiplier"] is float
    assert "num_classes" not in model_options("vit_s16")
    with pytest.raises(ValueError, match="did you mean resnet18"):
        model_options("resnet19")
    with pytest.raises(ValueError, match="'resnet20' has no option 'stem'; it has in_channels"):
        models.create("resnet20", num_classes=3, rngs=nnx.Rngs(0), stem="small")


class Own(nnx.Module):
    def __init__(self, *, num_classes: int, rngs: nnx.Rngs, width: int = 4):
        self.layer = nnx.Linear(width, num_classes, rngs=rngs)


class Untyped(nnx.Module):
    def __init__(self, *, num_classes, rngs, width=4):
        self.layer = nnx.Linear(width, num_classes, rngs=rngs)


def make_own(**options):
    return Own(**options)


def make_annotated(**options) -> Own:
    return Own(**options)


@pytest.mark.parametrize("factory", [Own, make_annotated])
def test_a_model_of_one_s_own_is_a_class_or_says_which_it_makes(factory, monkeypatch):
    monkeypatch.setitem(MODELS, "own", factory)
    assert model_options("own") == {"width": int}
    model = models.create("own", num_classes=3, rngs=nnx.Rngs(0), width=2)
    assert model.layer.kernel.shape == (2, 3)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (make_own, "model 'own': annotate what it returns.*make_own"),
        (Untyped, "model 'own': annotate the types of its options width"),
    ],
)
def test_what_a_model_does_not_say_of_itself_is_named(factory, message, monkeypatch):
    monkeypatch.setitem(MODELS, "own", factory)
    with pytest.raises(ValueError, match=message):
        model_options("own")

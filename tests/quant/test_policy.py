"""Rules: the first match decides, and mistakes are named before any work."""

import numpy as np
import pytest

from stp_jax import Policy, Rule
from stp_jax.quant.policy import UnmatchedRuleError

PATHS = ["encoder.layer1.conv", "encoder.layer2.conv", "head"]


def test_first_matching_rule_decides_and_no_match_means_float():
    policy = Policy([Rule(path="head", budget=3), Rule(path="encoder.*|head", budget=5)])
    assert policy.find("head").budget == 3
    assert policy.find("encoder.layer1.conv").budget == 5
    assert policy.find("decoder") is None


def test_a_pattern_must_match_the_whole_path():
    assert Policy([Rule(path="head")]).find("head.bias") is None


def test_keep_float_hides_later_rules():
    policy = Policy([Rule(path="head", keep_float=True), Rule(path=".*")])
    assert policy.find("head") is None
    policy.check(PATHS)


def test_unmatched_rule_lists_near_misses():
    with pytest.raises(UnmatchedRuleError, match=r"encoder\.layer1\.conv"):
        Policy([Rule(path="encoder.layer1.convolution")]).check(PATHS)


def test_shadowed_rule_is_an_error():
    with pytest.raises(UnmatchedRuleError, match="taken by an earlier rule"):
        Policy([Rule(path=".*"), Rule(path="head")]).check(PATHS)


def test_rule_for_embeddings_only_must_say_so():
    with pytest.raises(UnmatchedRuleError, match="embeddings=True"):
        Policy([Rule(path="head")]).check(PATHS, tables=["head"])
    Policy([Rule(path="head", embeddings=True)]).check(PATHS, tables=["head"])
    Policy([Rule(path="head", keep_float=True)]).check(PATHS, tables=["head"])
    Policy([Rule(path=".*")]).check(PATHS, tables=["head"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"path": "layer["}, "no regular expression"),
        ({"weight_scale": "min"}, "max, search, learned"),
        ({"activations": "int8"}, "none, dynamic, calibrated, learned"),
        ({"activation_bits": 1}, "2 or more"),
        ({"budget": 33}, r"outside \[0, 32\]"),  # 8 weights of at most 4 NAF terms
        ({"budget": -1}, "outside"),
        ({"budget": 2, "group_size": 0}, "group_size"),
        ({"budget": 2, "encoding": "gray"}, "gray"),
        ({"budget": 2, "method": "best"}, "best"),
    ],
)
def test_wrong_attributes_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        Rule(**{"path": ".*", **wrong})


def test_policies_are_hashable_values():
    assert Policy([Rule(path="a")]) == Policy((Rule(path="a"),))
    assert len({Policy([Rule(path="a")]), Policy([Rule(path="a")])}) == 1


@pytest.mark.parametrize("budget", [[0], 2.0, np.array([2, 3])])
def test_a_rule_has_one_integer_budget(budget):
    with pytest.raises(TypeError, match="set_budgets"):
        Rule(path=".*", budget=budget)

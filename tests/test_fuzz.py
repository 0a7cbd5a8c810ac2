"""Arguments at random: the public API returns what it promises, or a ValueError or TypeError.

Anything else, a crash inside a library or an attribute that is missing, is a failure here.
"""

import dataclasses
import string
import typing

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import stp_jax
from experiments import configs
from experiments.config import Config, ConfigError, override
from experiments.configs.hw_compare import HardwareConfig
from stp_jax import hwmodel, terms

# Weights beyond float32 become infinite, and are clipped as all others; NumPy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")

REFUSALS = (ValueError, TypeError)
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 300), max_size=3),
    st.sampled_from([np.int64(4), np.float32(2.5), np.nan, 1j, b"x", {}, object]),
)


def mostly(strategy):
    """A sound value three times of four, so that later arguments are reached as well."""
    return st.one_of(strategy, strategy, strategy, junk)


encodings = mostly(st.sampled_from(list(terms.ENCODINGS)))
bits = mostly(st.integers(1, 10))  # what a table of all values is made of in no time
integers = mostly(st.lists(st.integers(-140, 140), max_size=6))


@FEW
@given(q=integers, encoding=encodings, bits=bits)
def test_encode_writes_digits_that_decode_or_refuses(q, encoding, bits):
    try:
        digits = terms.encode(q, encoding, bits)
    except REFUSALS:
        return
    assert set(np.unique(digits)) <= {-1, 0, 1}
    np.testing.assert_array_equal(terms.decode(digits, encoding), q)


@FEW
@given(
    w=mostly(st.lists(st.one_of(st.integers(-200, 200), st.floats(-200, 200)), max_size=6)),
    group_size=mostly(st.integers(1, 3)),
    budget=mostly(st.integers(0, 6)),
    axis=mostly(st.just(0)),
    method=mostly(st.sampled_from(list(terms.METHODS))),
    encoding=encodings,
    bits=mostly(st.sampled_from([4, 8])),
)
def test_project_keeps_its_budget_or_refuses(w, group_size, budget, axis, method, encoding, bits):
    options = {"method": method, "encoding": encoding, "bits": bits}
    try:
        with jax.numpy_dtype_promotion("standard"):
            values = terms.project(w, group_size=group_size, budget=budget, axis=axis, **options)
    except REFUSALS:
        return
    held = np.asarray(terms.count(values, encoding, bits))
    for start in range(0, len(held), group_size):
        assert held[start : start + group_size].sum() <= budget


@FEW
@given(
    v=integers,
    group_size=mostly(st.integers(1, 4)),
    budget=mostly(st.integers(0, 16)),
    axis=mostly(st.just(0)),
    encoding=encodings,
)
def test_pack_unpacks_or_refuses(v, group_size, budget, axis, encoding):
    try:
        stream = terms.pack(v, group_size=group_size, budget=budget, axis=axis, encoding=encoding)
    except REFUSALS:
        return
    np.testing.assert_array_equal(terms.unpack(stream), v)


@settings(FEW, max_examples=150)
@given(
    data=st.binary(max_size=8),
    length=st.integers(1, 9),
    group_size=st.integers(1, 5),
    budget=st.integers(0, 6),
)
def test_any_bytes_are_a_stream_of_known_terms_or_refused(data, length, group_size, budget):
    try:
        stream = terms.PackedTerms(
            data=np.frombuffer(data, np.uint8),
            shape=(length,),
            axis=0,
            group_size=group_size,
            budget=budget,
        )
        values = terms.unpack(stream)
    except ValueError:
        return
    assert values.shape == (length,) and np.abs(values).max() <= budget * 128


rules = st.fixed_dictionaries(
    {"path": mostly(st.sampled_from([".*", "fc", "layer[12]"]))},
    optional={
        "budget": mostly(st.integers(0, 32)),
        "group_size": mostly(st.integers(1, 16)),
        "encoding": encodings,
        "method": mostly(st.sampled_from(list(terms.METHODS))),
        "bits": mostly(st.integers(2, 8)),
        "weight_scale": mostly(st.sampled_from(["max", "search", "learned"])),
        "activations": mostly(st.sampled_from(["none", "dynamic", "calibrated", "learned"])),
        "activation_bits": mostly(st.integers(2, 8)),
        "activation_terms": mostly(st.integers(1, 4)),
    },
)


@settings(FEW, max_examples=150)
@given(attributes=rules)
def test_a_rule_is_sound_or_refused(attributes):
    try:
        rule = stp_jax.Rule(**attributes)
    except REFUSALS:
        return
    assert rule.format.max_budget >= (rule.budget or 0) >= 0
    policy = stp_jax.Policy([rule])
    found = policy.find("fc")
    assert found is None or found is rule


@FEW
@given(rules=st.one_of(junk, st.lists(junk, max_size=2)))
def test_a_policy_of_junk_is_refused(rules):
    try:
        policy = stp_jax.Policy(rules)
    except REFUSALS:
        return
    assert policy.rules == ()


sizes = mostly(st.integers(1, 64))
arrays = st.fixed_dictionaries(
    {"rows": sizes, "cols": sizes},
    optional={
        "dataflow": mostly(st.sampled_from(["is", "ws", "os"])),
        "ifmap_sram": mostly(st.integers(1, 2**20)),
        "dram_bandwidth": mostly(st.floats(0.1, 100.0)),
    },
)
group_pes = st.fixed_dictionaries(
    {},
    optional={
        "group_size": mostly(st.integers(1, 16)),
        "encoding": encodings,
        "bits": mostly(st.integers(1, 10)),
        "grouping": mostly(st.sampled_from(["flat", "channels"])),
    },
)
convolutions = st.fixed_dictionaries(
    {
        "in_size": mostly(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        "kernel": mostly(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "channels": sizes,
        "filters": sizes,
    },
    optional={
        "stride": mostly(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": mostly(st.sampled_from(["SAME", "VALID"])),
        "groups": mostly(st.integers(1, 3)),
        "batch": sizes,
    },
)


@settings(FEW, max_examples=150)
@given(array=arrays, pe=group_pes, layer=convolutions, budgets=mostly(st.integers(0, 8)))
def test_the_accelerator_model_counts_or_refuses(array, pe, layer, budgets):
    try:
        network = hwmodel.Network((hwmodel.conv("layer", **layer),))
        built = hwmodel.Array(**array, pe=hwmodel.GroupPE(**pe))
        report = hwmodel.evaluate(network, built, budgets=budgets)
    except REFUSALS:
        return
    assert report.total_cycles >= 0
    assert 0 <= report.utilization[0] <= 1
    assert all(np.isfinite(value).all() for value in report.energy_pj.values())


keys = st.sampled_from([field.name for field in dataclasses.fields(Config)])
values = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["none", "", "true", "resnet18", "mlp", "/", "\0", "1e999", "-0", "naf", "("]),
    st.text(string.digits + ".,()[]e-", max_size=8),
)
texts = st.one_of(
    st.text(max_size=12),
    st.builds("{}={}".format, keys, values),
    st.builds("model_options.{}={}".format, st.sampled_from(["hidden", "depth", ""]), values),
)


@settings(FEW, max_examples=500)
@given(
    base=st.sampled_from(
        [
            configs.load(name).CONFIG
            for name in ("stp_mlp", "stp_resnet18", "stp_mobilenet_v2", "hw_compare")
        ]
    ),
    texts=st.lists(texts, max_size=3),
)
def test_settings_give_a_typed_configuration_or_name_what_is_wrong(base, texts):
    try:
        config = override(base, texts)
    except ConfigError as error:
        assert str(error)
        return
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint in (int, float, str):
            assert type(value) in ((int, float) if hint is float else (hint,)), name


@pytest.mark.parametrize("kind", [Config, HardwareConfig])
def test_no_numeric_key_takes_nan_or_infinity(kind):
    hints = typing.get_type_hints(kind)
    for name in (name for name, hint in hints.items() if hint is float):
        for text in ("nan", "inf", "-inf"):
            with pytest.raises(ConfigError, match=name):
                override(kind(), [f"{name}={text}"])

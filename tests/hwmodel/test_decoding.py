"""Prefill and decode: the products of a traced model, and bytes counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import stp_jax
from stp_jax import hwmodel, models

SIZES = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 48}
TINY = hwmodel.Decoder(**SIZES, vocabulary=40)
PARALLEL = hwmodel.Array(rows=8, cols=8)


def model():
    return models.create("decoder_lm", num_classes=40, rngs=nnx.Rngs(0), context=24, **SIZES)


def test_prefill_has_the_products_of_the_traced_model():
    traced = hwmodel.trace(model(), jax.ShapeDtypeStruct((3, 6), jnp.int32))
    ours = TINY.step(tokens=6, batch=3)
    assert ours.names[:-1] == traced.names[:-1]
    for mine, theirs in zip(ours, traced, strict=True):
        assert mine.macs == theirs.macs
        if mine.kind == "dense" and mine.name != "embed":
            assert mine == theirs
    # The model repeats keys for the query heads that share them, the array need not.
    scores, repeated = ours.layers[3], traced.layers[3]
    assert scores.weight_words * 2 == repeated.weight_words


def test_decode_has_the_products_of_the_cached_model():
    lm = model()

    class Decode(nnx.Module):
        def __init__(self):
            self.lm = lm

        def __call__(self, tokens):
            return self.lm.continue_from(tokens, self.lm.empty_cache(3), 23)[0]

    traced = hwmodel.trace(Decode(), jax.ShapeDtypeStruct((3, 1), jnp.int32))
    ours = TINY.step(past=23, batch=3)
    assert [layer.macs for layer in ours] == [layer.macs for layer in traced]


@pytest.mark.parametrize("past", [0, 5, 300])
def test_bytes_of_a_decoded_token(past):
    cost = hwmodel.token_cost(hwmodel.evaluate(TINY.step(past=past), PARALLEL))
    block = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 48
    assert TINY.cache_words_per_token == 2 * 2 * 16
    assert cost.weight_bytes == 2 * block + 32 * 40
    assert cost.cache_read_bytes == (past + 1) * TINY.cache_words_per_token
    assert cost.cache_write_bytes == TINY.cache_words_per_token


def test_bytes_and_energy_add_up_to_the_report():
    # Sums that leave the chip, and weights that do not fit their buffer.
    array = dataclasses.replace(PARALLEL, ofmap_sram=64, filter_sram=256, ifmap_sram=64)
    for batch, tokens in ((1, 1), (2, 1), (2, 16)):
        report = hwmodel.evaluate(TINY.step(tokens=tokens, past=7, batch=batch), array)
        cost = hwmodel.token_cost(report)
        assert cost.dram_bytes * batch * tokens == pytest.approx(float(report.dram_bytes.sum()))
        assert cost.total_energy_pj * batch * tokens == pytest.approx(float(report.total_energy_pj))
        assert cost.other_bytes > 0


def test_a_batch_shares_weights_but_no_cache():
    one, eight = (
        hwmodel.token_cost(hwmodel.evaluate(TINY.step(past=9, batch=n), PARALLEL)) for n in (1, 8)
    )
    assert one.weight_bytes == 8 * eight.weight_bytes
    assert one.cache_read_bytes == eight.cache_read_bytes


def test_packed_terms_save_weights_and_not_the_cache():
    policy = stp_jax.Policy([stp_jax.Rule(path=".*", budget=4, activations="none")])
    stp = stp_jax.quantize(model(), policy)
    pe = stp_jax.group_pe(stp, packed=True)
    network = TINY.step(past=9)
    report = hwmodel.evaluate(
        network,
        hwmodel.Array(rows=8, cols=8, pe=pe),
        budgets=stp_jax.budgets(stp),
        weights=stp_jax.integer_weights(stp),
    )
    ours = hwmodel.token_cost(report)
    int8 = hwmodel.token_cost(hwmodel.evaluate(network, PARALLEL))
    assert ours.weight_bytes < int8.weight_bytes
    assert ours.cache_read_bytes == int8.cache_read_bytes
    assert ours.cache_write_bytes == int8.cache_write_bytes


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"kv_heads": 3}, {"depth": 0}, {"hidden": 1.5}])
def test_bad_extents_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        hwmodel.Decoder(**{**SIZES, "vocabulary": 40, **wrong})


def test_bad_steps_and_other_networks_are_refused():
    for wrong in ({"tokens": 0}, {"past": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TINY.step(**wrong)
    other = hwmodel.evaluate(hwmodel.Network((hwmodel.dense("fc", 8, 8),)), PARALLEL)
    with pytest.raises(ValueError, match=r"Decoder\.step"):
        hwmodel.token_cost(other)

"""Outputs that stay on the chip: traffic counted by hand, and what any network must obey."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_jax import hwmodel, models
from stp_jax.hwmodel import Links

# a → b → c, and the sum of a and c leaves: 4 rows, 10 inputs, 16 channels in between.
LAYERS = (
    hwmodel.dense("a", 10, 16, rows=4),
    hwmodel.dense("b", 16, 16, rows=4),
    hwmodel.dense("c", 16, 16, rows=4),
)
RESIDUAL = hwmodel.Network(
    LAYERS, links=(Links(), Links(inputs="a"), Links(inputs="b", merged="a", leaves=True))
)
WEIGHTS = 10 * 16 + 16 * 16 + 16 * 16
ENOUGH = 1 << 40


def array(**fields):
    return hwmodel.Array(**{"rows": 32, "cols": 32} | fields)


def evaluated(network, capacity, **fields):
    return hwmodel.evaluate(network, array(activation_sram=capacity, **fields))


@pytest.mark.parametrize(
    ("capacity", "inputs", "outputs", "buffer"),
    [
        (0, [40, 64, 64], [64, 64, 64], [0, 0, 0]),
        (63, [40, 64, 64], [64, 64, 64], [0, 0, 0]),
        # b is there for two layers and a, because of the addition, for all three: b goes first.
        (64, [40, 64, 0], [64, 0, 64], [0, 64, 64]),
        (127, [40, 64, 0], [64, 0, 64], [0, 64, 64]),
        (128, [40, 0, 0], [0, 0, 64], [64, 128, 64]),
    ],
)
def test_a_chain_with_a_residual_addition_by_hand(capacity, inputs, outputs, buffer):
    report = evaluated(RESIDUAL, capacity)
    assert report.dram_operand_bytes["ifmap"].tolist() == inputs
    assert report.dram_operand_bytes["ofmap"].tolist() == outputs
    assert report.dram_operand_bytes["filter"].sum() == WEIGHTS
    assert report.sram_bytes["activation"].tolist() == buffer
    assert report.dram_bytes.sum() == sum(inputs) + sum(outputs) + WEIGHTS


def test_without_the_addition_one_tensor_s_room_is_reused():
    """a is dead when c writes: 64 bytes hold a, 128 hold a and b, which overlap in layer b."""
    chain = hwmodel.Network(LAYERS)
    assert evaluated(chain, 64).dram_operand_bytes["ofmap"].tolist() == [0, 64, 64]
    assert evaluated(chain, 128).dram_operand_bytes["ofmap"].tolist() == [0, 0, 64]


def test_energy_and_stalls_follow_the_bytes():
    technology = hwmodel.HOROWITZ_45NM
    off, on = (evaluated(RESIDUAL, n, dram_bandwidth=0.01) for n in (0, 128))
    for report in (off, on):  # a layer that waits for its operands alone computes after that
        beside = report.cycles - report.dram_bytes / 0.01
        assert ((beside > -1e-6) & (beside < report.compute_cycles + 1e-6)).all()
    pj = technology.energy_pj["dram_64b"] / 8
    saved = off.energy_pj["dram"].sum() - on.energy_pj["dram"].sum()
    assert saved == pytest.approx(4 * 64 * pj)
    more = on.energy_pj["sram"].sum() - off.energy_pj["sram"].sum()
    assert more == pytest.approx(4 * 64 * technology.sram_pj_per_byte(128.0))
    for component in ("array", "registers", "encoder"):
        np.testing.assert_array_equal(on.energy_pj[component], off.energy_pj[component])


def test_the_buffer_has_a_port_that_all_arrays_share():
    wide = hwmodel.Network((hwmodel.dense("a", 8, 64, rows=64), hwmodel.dense("b", 64, 8, rows=64)))
    for count in (1, 2):
        report = evaluated(wide, 4096, sram_bandwidth=0.001, count=count)
        own = max(n.max() for n in (report.sram_bytes["ifmap"], report.sram_bytes["ofmap"]))
        assert report.cycles.max() * 0.001 == pytest.approx(max(own / count, 4096))


def drawn_network(data):
    """Layers of which each reads an earlier output, or the input, and adds another one."""
    count = data.draw(st.integers(2, 8))
    widths = [data.draw(st.integers(1, 9)) for _ in range(count + 1)]
    layers, links = [], []
    for i in range(count):
        source = data.draw(st.integers(-1, i - 1))
        layers.append(hwmodel.dense(f"l{i}", widths[source + 1], widths[i + 1], rows=3))
        merged = data.draw(st.sets(st.integers(0, i), max_size=2)) if i else ()
        links.append(
            Links(
                inputs=() if source < 0 else f"l{source}",
                merged=tuple(f"l{j}" for j in sorted(merged)),
                leaves=data.draw(st.booleans()) or i == count - 1,
            )
        )
    return hwmodel.Network(tuple(layers), links=tuple(links))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_stays_fits_and_more_room_never_means_more_traffic(data):
    network = drawn_network(data)
    index = {name: i for i, name in enumerate(network.names)}
    before = np.inf
    for capacity in sorted(data.draw(st.lists(st.integers(0, 120), min_size=3, max_size=6))):
        report = evaluated(network, capacity)
        assert report.dram_bytes.sum() <= before
        before = report.dram_bytes.sum()
        # A buffer that is filled and emptied step by step never overflows.
        stays = report.accesses["sram_activation_write"] > 0
        for step in range(len(network)):
            held = 0
            for name, i in index.items():
                links = enumerate(network.links)
                readers = [j for j, k in links if (name, 1.0) in k.inputs or name in k.merged]
                if stays[i] and i <= step <= max(readers):
                    held += network.layers[i].output_words
            assert held <= capacity
        for i, (layer, link) in enumerate(zip(network, network.links, strict=True)):
            on_chip = bool(link.inputs) and stays[index[link.inputs[0][0]]]
            assert report.accesses["dram_ifmap_read"][i] == (0 if on_chip else layer.input_words)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_without_a_buffer_nothing_stays_and_with_room_for_all_only_ends_leave(data):
    network = drawn_network(data)
    linked, plain = evaluated(network, 0), evaluated(hwmodel.Network(network.layers), 0)
    for name, count in plain.accesses.items():
        np.testing.assert_array_equal(linked.accesses[name], count)
    report = evaluated(network, ENOUGH)
    read = {name for link in network.links for name, _ in link.inputs}
    used = read | {name for link in network.links for name in link.merged}
    for i, (layer, link) in enumerate(zip(network, network.links, strict=True)):
        first = 0 if link.inputs else layer.input_words
        last = layer.output_words if link.leaves or layer.name not in used else 0
        assert report.accesses["dram_ifmap_read"][i] == first
        assert report.accesses["dram_ofmap_write"][i] == last
    np.testing.assert_array_equal(
        report.accesses["dram_filter_read"], linked.accesses["dram_filter_read"]
    )


@pytest.fixture(scope="module")
def resnet18():
    model = nnx.eval_shape(lambda: models.create("resnet18", num_classes=1000, rngs=nnx.Rngs(0)))
    return hwmodel.trace(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))


def test_resnet18_at_256_kib_by_hand(resnet18):
    """Words of one output: 200704 in stage 1, then 100352, 50176 and 25088 (He et al., table 1).

    Two outputs of stage 1 exceed 262144 bytes, so only those that the next layer alone reads stay.
    """
    stage1 = 2 * (200704 + 200704)  # conv1 of both blocks: written and read
    # Shortcut and both conv1. Block 0's conv2 would be the third at the shortcut, beside the input
    # from stage 1; block 1's, which both the shortcut and conv1 of stage 3 read, the fourth.
    stage2 = 3 * (100352 + 100352)
    # All: those three, block 0's conv2 that only the addition reads, and block 1's, of which the
    # shortcut of stage 4 reads a quarter of the pixels.
    stage3 = 3 * (50176 + 50176) + 50176 + (50176 + 50176 + 256 * 7 * 7)
    stage4 = 3 * (25088 + 25088) + 25088 + (25088 + 512)  # fc reads the pooled output
    off, on = evaluated(resnet18, 0), evaluated(resnet18, 256 << 10)
    assert off.dram_bytes.sum() - on.dram_bytes.sum() == stage1 + stage2 + stage3 + stage4


def test_resnet18_with_room_for_all_moves_its_image_weights_and_logits(resnet18):
    report = evaluated(resnet18, ENOUGH, filter_sram=16 << 20)
    assert report.dram_bytes.sum() == 224 * 224 * 3 + 1000 + resnet18.extents("weight_words").sum()
    # At its fullest: the output of conv1, before pooling, beside two of stage 1.
    needed = 64 * 112 * 112 + 2 * 64 * 56 * 56
    assert evaluated(resnet18, needed, filter_sram=16 << 20).dram_bytes.sum() == (
        report.dram_bytes.sum()
    )
    assert evaluated(resnet18, needed - 1).dram_operand_bytes["ofmap"].sum() > 1000


def test_capacities_are_swept_and_traced(resnet18):
    capacities = [0, 1 << 18, 1 << 21]
    swept = hwmodel.sweep(resnet18, {"activation_sram": capacities, "dram_bandwidth": [4.0] * 3})
    for i, capacity in enumerate(capacities):
        report = evaluated(resnet18, capacity, dram_bandwidth=4.0)
        np.testing.assert_allclose(swept["dram_bytes"][i], report.dram_bytes.sum(), rtol=1e-6)
        np.testing.assert_allclose(swept["cycles"][i], report.total_cycles, rtol=1e-6)
        np.testing.assert_allclose(swept["sram_pj"][i], report.energy_pj["sram"].sum(), rtol=1e-5)

    def moved(capacity):
        design = array(activation_sram=capacity)
        return hwmodel.evaluate(RESIDUAL, design, smoothing=0.1).dram_bytes.sum()

    assert jax.grad(moved)(60.0) < 0.0
    smooth = hwmodel.evaluate(RESIDUAL, array(), smoothing=0.9).dram_bytes
    np.testing.assert_array_equal(smooth, evaluated(RESIDUAL, 0).dram_bytes)


def test_operands_of_attention_stay_except_for_the_cache():
    decoder = hwmodel.Decoder(width=32, depth=1, heads=4, kv_heads=2, hidden=48, vocabulary=40)
    for past in (0, 5):
        call = decoder.step(tokens=3, past=past)
        off, on = (hwmodel.token_cost(evaluated(call, n)) for n in (0, ENOUGH))
        assert on.weight_bytes == off.weight_bytes
        assert on.cache_write_bytes == off.cache_write_bytes == decoder.cache_words_per_token
        assert on.cache_read_bytes * 3 == pytest.approx(past * decoder.cache_words_per_token)
        # Query, key and value read the input, and the logits leave.
        assert on.other_bytes * 3 == pytest.approx(3 * 3 * 32 + 3 * 40)


def test_a_sequence_is_a_chain_where_channels_fit():
    network = hwmodel.Network(
        (
            hwmodel.conv("stem", (8, 8), channels=3, filters=6, kernel=3),
            hwmodel.conv("flat", (4, 4), channels=6, filters=8, kernel=1),  # after pooling
            hwmodel.conv("shortcut", (8, 8), channels=6, filters=8, kernel=1),
            hwmodel.dense("fc", 8 * 4, 10),  # of a flattened input
        )
    )
    report = evaluated(network, ENOUGH)
    np.testing.assert_array_equal(report.accesses["dram_ifmap_read"], [3 * 64, 0, 6 * 64, 0])
    np.testing.assert_array_equal(report.accesses["dram_ofmap_write"], [0, 8 * 16, 0, 10])


@pytest.mark.parametrize("capacity", [-1, 0.5, np.inf, "big", True])
def test_capacities_that_are_no_size_are_refused(capacity):
    with pytest.raises(ValueError, match="activation_sram must be an integer, 0 or more"):
        array(activation_sram=capacity)


@pytest.mark.parametrize(
    ("links", "error", "message"),
    [
        ((Links(),), ValueError, "needs one Links each, got 1"),
        ((Links(), Links(inputs="c"), Links()), ValueError, "'b' is linked to 'c', which is no"),
        ((Links(), Links(inputs="b"), Links()), ValueError, "'b' is linked to 'b', which is no"),
        ((Links(), Links(merged="d"), Links()), ValueError, "'b' is linked to 'd', which is no"),
        ((Links(), Links(), Links(inputs=(("a", 1.0), ("b", 0.5)))), ValueError, "at most 1"),
        ((Links(), Links(operands=(("a", 0.0),)), Links()), ValueError, "above 0"),
        ((Links(), "a", "b"), TypeError, "must be hwmodel.Links, got 'a'"),
    ],
)
def test_links_that_do_not_fit_are_refused(links, error, message):
    with pytest.raises(error, match=message):
        hwmodel.Network(LAYERS, links=links)
    with pytest.raises(ValueError, match="activation_sram must be positive whole"):
        hwmodel.sweep(RESIDUAL, {"activation_sram": [-1]})


def test_links_are_names_or_pairs():
    with pytest.raises(TypeError, match="operands must be a name, or pairs"):
        Links(operands=["a"])
    assert Links(inputs=[("a", 1.0)], merged=["b"]) == Links(inputs="a", merged="b")


def test_links_are_part_of_a_network():
    assert dataclasses.replace(RESIDUAL, links=None) != RESIDUAL
    assert hash(dataclasses.replace(RESIDUAL)) == hash(RESIDUAL)

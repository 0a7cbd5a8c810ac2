"""Layouts of weights, ragged groups, and whose statistics they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stp_jax import hwmodel, terms

CONV = hwmodel.conv("c", (6, 6), channels=4, filters=10, kernel=(3, 2))
DENSE = hwmodel.dense("d", 12, 6)
PRODUCT = hwmodel.matmul("m", 5, 4, 3, products=2)
PE = hwmodel.GroupPE(group_size=4)


def evaluated(layer, weights, **kwargs):
    array = hwmodel.Array(rows=4, cols=4, pe=PE)
    network = hwmodel.Network((layer,))
    return hwmodel.evaluate(network, array, weights={layer.name: weights}, **kwargs)


def random(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (CONV, (10, 4, 3, 2)),  # PyTorch's OIHW
        (CONV, (4, 3, 2, 10)),
        (CONV, (2, 3, 4, 10)),
        (DENSE, (6, 12)),
        (DENSE, (2, 3, 6, 2)),  # heads in front of the inputs
        (DENSE, (72,)),
        (PRODUCT, (2, 3, 4)),
        (PRODUCT, (4, 2, 3)),
    ],
)
def test_weights_in_another_layout_are_refused(layer, shape):
    with pytest.raises(ValueError, match="in a known layout; expected"):
        evaluated(layer, random(*shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (CONV, (3, 2, 4, 10)),
        (CONV, (24, 10)),
        (DENSE, (12, 6)),
        (DENSE, (12, 2, 3)),  # DenseGeneral into heads
        (DENSE, (4, 3, 6)),  # and out of them
        (PRODUCT, (4, 6)),
    ],
)
def test_every_known_layout_is_the_same_matrix(layer, shape):
    w = random(*shape)
    ours, matrix = evaluated(layer, w), evaluated(layer, w.reshape(layer.K, layer.filters))
    np.testing.assert_array_equal(ours.budgets, matrix.budgets)
    assert ours.operations["terms"][0] == terms.count(w.astype(np.int32)).sum() * layer.P


def test_products_in_front_are_transposed():
    w = random(2, 4, 3)
    w[0] = 0
    largest = np.asarray(terms.count(w[1].astype(np.int32))).sum(axis=0).max()
    report = evaluated(PRODUCT, w)
    assert report.budgets.tolist() == [largest]
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.BitWave(lanes=4))
    network = hwmodel.Network((PRODUCT,))
    reports = [
        hwmodel.evaluate(network, array, weights={"m": given})
        for given in (w, np.concatenate(list(w), axis=1))
    ]
    np.testing.assert_array_equal(reports[0].cycles, reports[1].cycles)


DEPTHWISE = hwmodel.conv("dw", (8, 8), channels=16, filters=16, kernel=(3, 3), groups=16)


@pytest.mark.parametrize("grouping", ["flat", "channels"])
def test_ragged_groups_hold_no_more_than_their_weights_can(grouping):
    """K = 9, g = 8: a whole group, and one weight that has at most 4 digits."""
    network = hwmodel.Network((DEPTHWISE,))
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8, grouping=grouping))
    report = hwmodel.evaluate(network, array)
    assert report.budgets.tolist() == [32]
    assert report.terms_per_mac == 4
    most = hwmodel.evaluate(network, array, weights={"dw": np.full((9, 16), 85)})  # 64+16+4+1
    np.testing.assert_array_equal(report.cycles, most.cycles)
    np.testing.assert_array_equal(report.operations["terms"], most.operations["terms"])
    eight = hwmodel.evaluate(network, array, budgets=8)
    assert eight.terms_per_mac == pytest.approx((8 + 4) / 9)
    traced = jax.jit(lambda k: hwmodel.evaluate(network, array, budgets=k))(jnp.float32(8))
    np.testing.assert_array_equal(traced.operations["terms"], eight.operations["terms"])


def test_the_default_budget_is_what_a_short_reduction_needs():
    layers = (
        hwmodel.dense("short", 3, 5),
        hwmodel.conv("rgb", (8, 8), channels=3, filters=5, kernel=(3, 3)),
    )
    network = hwmodel.Network(layers)

    def budgets(grouping):
        pe = hwmodel.GroupPE(group_size=8, grouping=grouping)
        return hwmodel.evaluate(network, hwmodel.Array(rows=4, cols=4, pe=pe)).budgets.tolist()

    assert budgets("flat") == [12, 32]
    assert budgets("channels") == [12, 12]


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_array_energy_of_whole_groups_is_linear_in_the_budget(smoothing):
    network = hwmodel.Network((hwmodel.dense("d", 64, 5),))
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE(group_size=8))
    energies = [
        hwmodel.evaluate(network, array, budgets=k, smoothing=smoothing).energy_pj["array"][0]
        for k in (1, 2, 16, 32)
    ]
    np.testing.assert_allclose(energies, energies[0] * np.array([1, 2, 16, 32]))


def test_statistics_belong_to_one_network_whatever_its_batch():
    network = hwmodel.Network((CONV, DENSE))
    array = hwmodel.Array(rows=4, cols=4, pe=PE)
    measured = hwmodel.measure_terms(network, {"d": random(12, 6)}, PE)
    batched = hwmodel.Network((dataclasses.replace(CONV, batch=8), DENSE))
    hwmodel.evaluate(batched, array, weights=measured)
    others = [(DENSE, CONV), (CONV,), (CONV, hwmodel.dense("d", 12, 7))]
    for layers in others:
        with pytest.raises(ValueError, match="measured on another network"):
            hwmodel.evaluate(hwmodel.Network(layers), array, weights=measured)


def test_weights_of_the_wrong_kind_are_refused():
    network = hwmodel.Network((DENSE,))
    measured = hwmodel.measure_terms(network, {"d": random(12, 6)}, PE)
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.Bitlet())
    with pytest.raises(TypeError, match=r"Bitlet reads the weights' digits: .* a mapping"):
        hwmodel.evaluate(network, array, weights=measured)
    with pytest.raises(TypeError, match=r"weights must be a mapping .* got list"):
        hwmodel.evaluate(network, array, weights=[random(12, 6)])


@pytest.mark.parametrize("known", [False, True])
def test_operands_computed_at_run_time_are_not_packed(known):
    network = hwmodel.Network((PRODUCT, DENSE))
    weights = {"m": random(2, 4, 3)} if known else None

    def report(packed):
        pe = hwmodel.GroupPE(group_size=4, packed=packed)
        array = hwmodel.Array(rows=4, cols=4, pe=pe)
        return hwmodel.evaluate(network, array, budgets=16, weights=weights)

    plain, packed = report(False), report(True)
    same = packed.dram_bytes == plain.dram_bytes
    assert same.tolist() == [not known, False]
    expected = plain.energy_pj["encoder"] * [not known, False]
    np.testing.assert_allclose(packed.energy_pj["encoder"], expected)

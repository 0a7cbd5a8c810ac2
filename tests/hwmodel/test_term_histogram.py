"""Layouts of weights, and the network that a histogram was measured on."""

import dataclasses

import numpy as np
import pytest
from networks import SMALL

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


def test_weights_that_are_no_integers_of_the_layer_are_refused():
    array = hwmodel.Array(rows=4, cols=4, pe=hwmodel.GroupPE())
    with pytest.raises(ValueError, match="do not hold"):
        hwmodel.evaluate(SMALL, array, weights={"a": np.zeros((3, 3, 5, 21), np.int8)})
    with pytest.raises(TypeError, match="integers"):
        hwmodel.evaluate(SMALL, array, weights={"d": np.zeros((70, 33))})
    with pytest.raises(ValueError, match="exceeds 8 bits"):
        hwmodel.evaluate(SMALL, array, weights={"d": np.full((70, 33), 200)})

import numpy as np
import pytest
from networks import resnet18

from stp_jax import hwmodel


def test_resnet18_has_its_published_size_and_closed_form_cycles():
    network = resnet18()
    assert len(network) == 21
    assert round(network.macs / 1e9, 3) == 1.814
    report = hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=32))
    K, P, M = (network.extents(name) for name in "KPM")
    folds = np.ceil(K / 32) * np.ceil(P / 32)
    np.testing.assert_array_equal(report.cycles, folds * (2 * 32 + 32 + M - 2))
    np.testing.assert_allclose(report.utilization, K * P * M / (1024 * report.cycles))


# 3.3e9 inputs, 6.6e10 outputs: more than 32 bits count.
LARGE = hwmodel.Network(
    (hwmodel.conv("c", (224, 224), channels=64, filters=64, kernel=(3, 3), batch=1024),)
)
ARRAY = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


def test_extents_that_need_more_than_32_bits_are_refused_by_name():
    network = hwmodel.Network(
        (hwmodel.dense("fc", 8, 4), hwmodel.dense("wide", 64, 64, rows=2**31))
    )
    assert hwmodel.evaluate(network, ARRAY, budgets=8).cycles[1] > 2**31
    with pytest.raises(ValueError, match=r"wide: P = 2147483648 is 2\*\*31 or more"):
        hwmodel.sweep(network, {"rows": [32], "budgets": [8]})
    with pytest.raises(ValueError, match="rows is 2147483648"):
        hwmodel.sweep(LARGE, {"rows": [2**31]})

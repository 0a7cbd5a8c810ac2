import dataclasses

import pytest

from stp_jax import hwmodel

INT8 = hwmodel.Array(rows=32, cols=32)
STP = hwmodel.Array(rows=32, cols=32, pe=hwmodel.GroupPE(group_size=8))


def test_edge_encoders_are_shared_by_the_columns():
    encoders = hwmodel.edge_encoders(STP)
    assert encoders.count == 32 * 8
    assert encoders.area_per_pe_um2 == pytest.approx(29.8 * 8 / 32)
    wide = dataclasses.replace(STP, cols=64)
    assert hwmodel.edge_encoders(wide).pj_per_use == pytest.approx(encoders.pj_per_use / 2)
    assert hwmodel.edge_encoders(dataclasses.replace(STP, pe=hwmodel.GroupPE(packed=True))) is None
    assert hwmodel.encoder_table(STP)["area_um2"].idxmin() == "booth2"
    with pytest.raises(ValueError, match="takes no encoded terms"):
        hwmodel.edge_encoders(INT8)


def test_encoders_are_where_weights_enter():
    """Rows where inputs are resident; else columns, down which weights move, or load to stay."""
    expected = {"is": (32 * 8, 64), "ws": (64 * 8, 1), "os": (64 * 8, 32)}
    for dataflow, (count, users) in expected.items():
        encoders = hwmodel.edge_encoders(dataclasses.replace(STP, cols=64, dataflow=dataflow))
        assert encoders.count == count
        assert encoders.pj_per_use == pytest.approx(encoders.pj_per_weight / users)

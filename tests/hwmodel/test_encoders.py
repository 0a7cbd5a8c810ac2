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


def test_areas_by_gates_are_those_of_the_netlists():
    gates = hwmodel.NANGATE_45NM_GATES

    def area(pe, **array):
        return hwmodel.array_area_um2(hwmodel.Array(rows=32, cols=16, pe=pe, **array), gates)

    assert area(hwmodel.DotProduct(weight_bits=2)) == {"pes": 512 * 1272.0, "encoders": 0.0}
    assert area(hwmodel.GroupPE()) == {"pes": 512 * 1140.0, "encoders": 32 * 1325.0}
    narrow = hwmodel.GroupPE(lanes=2, bits=4)
    assert area(narrow, count=3) == {"pes": 3 * 512 * 867.2, "encoders": 3 * 32 * 772.5}
    assert area(hwmodel.GroupPE(lanes=4, packed=True)) == {"pes": 512 * 1465.0, "encoders": 0.0}


@pytest.mark.parametrize(
    ("pe", "dataflow"),
    [
        (hwmodel.GroupPE(group_size=16), "is"),
        (hwmodel.GroupPE(bits=4), "is"),  # of several lanes alone
        (hwmodel.GroupPE(encoding="booth4"), "is"),
        (hwmodel.GroupPE(), "ws"),
        (hwmodel.TermMac(), "is"),
    ],
)
def test_areas_by_gates_of_what_was_not_measured_are_refused(pe, dataflow):
    array = dataclasses.replace(STP, pe=pe, dataflow=dataflow)
    with pytest.raises(ValueError, match="by gates are those of netlists"):
        hwmodel.array_area_um2(array, hwmodel.NANGATE_45NM_GATES)

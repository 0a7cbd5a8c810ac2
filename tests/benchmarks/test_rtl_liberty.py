"""The Liberty reader: units, tables, conditions, expressions."""

import gzip
import itertools

import numpy as np
import pytest

from benchmarks.rtl.liberty import Library, Table, expression, read_library
from tests.benchmarks.tiny_library import TINY


def test_numbers_come_in_ns_femtofarads_femtojoules_and_nanowatts(tiny):
    inverter = tiny.cell("INV")
    (arc,) = inverter.pins["Y"].arcs
    assert inverter.pins["A"].capacitance == pytest.approx(2.0)
    assert inverter.leakage == pytest.approx(1.0)
    assert arc.tables["cell_rise"].at(slew=0.05, load=5.0) == pytest.approx(0.015)
    assert (tiny.name, tiny.revision, tiny.voltage) == ("tiny", "7", 1.0)


def test_tables_follow_their_templates_order_of_axes(tiny):
    (power,) = tiny.cell("INV").pins["Y"].power
    assert power.tables["fall"].at(slew=0.1, load=0.0) == pytest.approx(1.0)
    assert power.tables["fall"].at(slew=0.0, load=10.0) == pytest.approx(2.0)
    assert power.tables["rise"].at(slew=0.3, load=99.0) == pytest.approx(3.0)


def test_a_look_up_is_exact_on_a_bilinear_function_and_beyond_the_table():
    x, y = np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0])
    table = Table(axes=("slew", "load"), points=(x, y), values=3 * x[:, None] + y + 1)
    for slew, load in [(0.5, 1.0), (2.0, 0.3), (6.0, 5.0), (-1.0, 2.0)]:
        assert table.at(slew=slew, load=load) == pytest.approx(3 * slew + load + 1)


def test_registers_and_clock_gates_are_known(tiny):
    register = tiny.cell("DFF").flip_flop
    assert (register.clocked_on, register.next_state) == ("CK", "D")
    gates = tiny.clock_gates("latch_posedge")
    assert [gate.name for gate in gates] == ["ICG_X1", "ICG_X4"]
    assert gates[0].clock_gate.enable == "E"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("!A & B", lambda a, b, c: (not a) and b),
        ("A + B * C", lambda a, b, c: a or (b and c)),
        ("A B + C", lambda a, b, c: (a and b) or c),
        ("(A + B)' ^ C", lambda a, b, c: (not (a or b)) != c),
        ("A & B ^ C", lambda a, b, c: a and (b != c)),
        ("!(!A | (B & !C))", lambda a, b, c: not (not a or (b and not c))),
    ],
)
def test_expressions_bind_as_liberty_says(text, meaning):
    written = expression(text)
    for a, b, c in itertools.product([False, True], repeat=3):
        pins = {"A": np.array([a]), "B": np.array([b]), "C": np.array([c])}
        assert eval(written, {}, pins)[0] == meaning(a, b, c), (text, a, b, c)


def test_packed_files_are_read(tmp_path):
    path = tmp_path / "tiny.lib.gz"
    path.write_bytes(gzip.compress(TINY.encode()))
    assert "NAND2" in read_library(path)


def test_what_is_no_library_is_refused():
    with pytest.raises(ValueError, match="library"):
        Library("cells (x) { }")

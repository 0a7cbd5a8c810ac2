"""Simulation of a netlist with an inertial delay for every instance, and what toggled in it.

Each cell becomes one continuous assignment with the rise and fall delay of its own load: pulses
shorter than that are swallowed, longer ones pass and cost energy. Clock gates have no delay, as the
clock is ideal, and registers start at random, so nothing is ever undefined.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Stimulus
from benchmarks.rtl.liberty import expression
from benchmarks.rtl.netlist import (
    Instance,
    Net,
    Netlist,
    net_name,
    pin_expression,
    port_aliases,
)
from benchmarks.rtl.play import TIMESCALE, play
from benchmarks.rtl.timing import Timing

Times = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Activity:
    """Changes of every net in a window of time, in ps.

    Attributes:
      start, stop: the window.
      first: net -> value at the window's start.
      times: net -> times at which it changed, ascending; its values alternate.
    """

    start: int
    stop: int
    first: Mapping[Net, bool]
    times: Mapping[Net, Times]

    def toggles(self, net: Net) -> int:
        """Changes of a net in the window."""
        return len(self.times[net]) if net in self.times else 0

    def before(self, net: Net, when: Times) -> npt.NDArray[np.bool_]:
        """Values just before these times."""
        return self._value(net, when, "left")

    def after(self, net: Net, when: Times) -> npt.NDArray[np.bool_]:
        """Values at these times, changes of the same moment included."""
        return self._value(net, when, "right")

    def last_change(self, net: Net, when: Times) -> Times:
        """Time of the latest change up to these times; -1 if there was none in the window."""
        changes = np.concatenate([[-1], self.times.get(net, np.zeros(0, np.int64))])
        return changes[np.searchsorted(changes, when, side="right") - 1]

    def _value(self, net: Net, when: Times, side: str) -> npt.NDArray[np.bool_]:
        if isinstance(net, str):
            return np.full(len(when), net == "1")
        changes = np.searchsorted(self.times[net], when, side=side)
        return (changes + self.first[net]) % 2 == 1


def simulate(
    netlist: Netlist, timing: Timing, stimulus: Stimulus, *, period: float, seed: int = 0
) -> Activity:
    """Plays a stimulus on the gates and checks every expected value.

    Args:
      netlist: of the design.
      timing: its static timing, for delays.
      stimulus: what the ports see.
      period: of the clock, in ns.
      seed: of the registers' first values.

    Raises:
      RuntimeError: a value differs from what is expected.
    """
    cycle = round(period * 1000)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "gates.v").write_text(verilog(netlist, timing, seed=seed))
        play(
            stimulus,
            netlist.top,
            [directory / "gates.v"],
            {},
            period=cycle,
            hold=max(1, round(timing.input_delay * 1000)),
            directory=directory,
            dump="changes.vcd",
        )
        start, stop = ((edge + 1) * cycle for edge in stimulus.measured)
        return read_changes(directory / "changes.vcd", netlist, start, stop)


def verilog(netlist: Netlist, timing: Timing, *, seed: int) -> str:
    """The netlist as Verilog with delays in ps."""
    random = np.random.default_rng(seed)
    registers = [i for i in netlist.instances if i.cell.flip_flop]
    declared = frozenset(r.pins[p.name] for r in registers for p in r.cell.outputs)
    ports = ", ".join([*netlist.inputs, *netlist.outputs])
    lines = [f"`timescale {TIMESCALE}", f"module {netlist.top} ({ports});"]
    for direction, group in (("input", netlist.inputs), ("output", netlist.outputs)):
        for port, nets in group.items():
            lines.append(f"    {direction} {f'[{len(nets) - 1}:0] ' * (len(nets) > 1)}{port};")
    lines += [f"    reg n{net};" for net in sorted(declared)]
    lines += port_aliases(netlist, declared=declared)
    for instance in netlist.instances:
        if instance.cell.flip_flop:
            lines += _register(instance, timing, bool(random.integers(2)))
        elif instance.cell.clock_gate:
            lines += _clock_gate(instance)
        else:
            lines += _gates(instance, timing)
    return "\n".join([*lines, "endmodule", ""])


def _delay(timing: Timing, net: Net, edge: str) -> int:
    return max(1, round(timing.delays[net][edge] * 1000))


def _register(instance: Instance, timing: Timing, first: bool) -> list[str]:
    flip_flop = instance.cell.flip_flop
    clock, data = (
        pin_expression(instance, text) for text in (flip_flop.clocked_on, flip_flop.next_state)
    )
    lines = []
    for pin in instance.cell.outputs:
        net = instance.pins[pin.name]
        inverted = pin.function == flip_flop.states[1]
        value = f"(~{data})" if inverted else data
        rise, fall = (_delay(timing, net, edge) for edge in ("rise", "fall"))
        lines.append(f"    initial n{net} = {int(first ^ inverted)};")
        lines.append(
            f"    always @(posedge {clock}) n{net} <= #({value} ? {rise} : {fall}) {value};"
        )
    return lines


def _clock_gate(instance: Instance) -> list[str]:
    gate = instance.cell.clock_gate
    if gate.kind != "latch_posedge":
        raise ValueError(f"{instance.cell.name}: only gates of kind latch_posedge are simulated")
    clock, enable, output = (
        net_name(instance.pins[pin]) for pin in (gate.clock, gate.enable, gate.output)
    )
    latch = f"{instance.name}_latch"
    return [
        f"    reg {latch} = 0;",
        f"    always @* if (~{clock}) {latch} = {enable};",
        f"    assign {output} = {clock} & {latch};",
    ]


def _gates(instance: Instance, timing: Timing) -> list[str]:
    lines = []
    for pin in instance.cell.outputs:
        net = instance.pins[pin.name]
        rise, fall = (_delay(timing, net, edge) for edge in ("rise", "fall"))
        value = pin_expression(instance, pin.function)
        lines.append(f"    assign #({rise}, {fall}) {net_name(net)} = {value};")
    return lines


def read_changes(path: Path, netlist: Netlist, start: int, stop: int) -> Activity:
    """Changes of the netlist's nets from a value change dump.

    The dump begins with the values at ``start``; those of the clock are then the ones just after
    its edge, which is added.

    Raises:
      RuntimeError: a net is missing or undefined.
    """
    wanted = {f"n{net}": net for net in netlist.nets}
    nets: dict[str, Net] = {}
    first: dict[str, str] = {}
    now: dict[str, str] = {}
    times: dict[str, list[int]] = {}
    time = 0
    with path.open() as file:
        for line in file:
            if line.startswith("$var"):
                _, _, _, code, name, *_ = line.split()
                if name in wanted and wanted[name] not in nets.values():
                    nets[code] = wanted[name]
            elif line.startswith("$enddefinitions"):
                break
        for line in file:
            kind = line[0]
            if kind == "#":
                time = int(line[1:])
                if time >= stop:
                    break
            elif kind in "01xz":
                code = line[1:-1]
                if code in now:
                    if now[code] != kind:
                        times[code].append(time)
                        now[code] = kind
                else:
                    first[code] = now[code] = kind
                    times[code] = []
    undefined = [
        nets[code] for code in nets if first.get(code, "x") not in "01" or now[code] in "xz"
    ]
    if undefined or len(nets) < len(wanted):
        raise RuntimeError(
            f"{netlist.top}: nets missing or undefined in the simulation: {undefined}"
        )
    changes = {net: np.array(times[code], np.int64) for code, net in nets.items()}
    values = {net: first[code] == "1" for code, net in nets.items()}
    for net in netlist.clock_nets:
        if values[net]:
            values[net] = False
            changes[net] = np.concatenate([[start], changes[net]])
    return Activity(start=start, stop=stop, first=values, times=changes)


@functools.cache
def compiled(text: str) -> Callable[[Mapping[str, npt.NDArray]], npt.NDArray]:
    """A function of pin values, by pin name, from a Liberty expression."""
    return eval(f"lambda pins: {expression(text, 'pins[{!r}]')}")

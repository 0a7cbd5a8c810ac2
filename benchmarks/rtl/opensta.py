"""A second estimate of power and timing: OpenSTA on the same netlist with the same activities.

OpenSTA gets each pin's transitions per cycle and share of time high, and weighs conditional tables
by these shares as if pins were independent; the bench looks at the state at each change.
Loads are the same: the bench's wire is written as a wire-load model. Four things are arranged so
that both see the same circuit:

* Conditions that name both outputs of a register (``!D & !Q & QN``) lose the second, which says
  nothing new but would halve their probability.
* Clock gates take their clock from a port of their own. OpenSTA takes every pin that a clock
  reaches for clocked in every cycle; so it goes by the activities that it is given.
* Registers' outputs leave by ports that carry their load, and what they drive enters by others.
  OpenSTA then finds every activity given; beyond registers it would assume some.
* Nets that no cell drives, those of input ports, are outside its report and of the comparison.

Activities of inner pins are honoured from version 2.2 (2020) on; an older one is refused.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from benchmarks.rtl.gate_simulation import Activity
from benchmarks.rtl.liberty import read_text
from benchmarks.rtl.netlist import Instance, Net, Netlist, structure
from benchmarks.rtl.synthesis import Target
from benchmarks.rtl.timing import EDGES, Timing

OLDEST = (2, 2)
# Behind a pin with activity and duty of a hundredth or less OpenSTA looks at nothing that is given.
_LEAST_DUTY = 0.011
_WIRE_LOAD = """
  wire_load ("bench") {{
    capacitance : {wire}; resistance : 0; slope : 1; fanout_length (1, 1);
  }}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power:
    """What the cells take, in W."""

    internal: float
    switching: float
    leakage: float

    @property
    def total(self) -> float:
        """W."""
        return self.internal + self.switching + self.leakage


def version() -> tuple[int, ...] | None:
    """The version of OpenSTA on PATH, or None."""
    if shutil.which("sta") is None:
        return None
    done = subprocess.run(["sta", "-version"], capture_output=True, text=True, check=True)
    return tuple(int(part) for part in re.findall(r"\d+", done.stdout))


def check_version() -> None:
    """Raises FileNotFoundError unless a version is on PATH that can make the estimate."""
    found = version()
    if found is None or found[:2] < OLDEST:
        has = "there is none" if found is None else f"version {'.'.join(map(str, found))} is"
        raise FileNotFoundError(
            f"the second estimate needs OpenSTA {'.'.join(map(str, OLDEST))} or newer as sta on "
            f"PATH, which honours activities of inner pins; {has} there"
        )


def shortest_period(netlist: Netlist, timing: Timing, aim: Target, *, period: float) -> float:
    """The shortest period of the clock by OpenSTA, in ns."""
    lines = [*_design(netlist, timing, aim, period), "report_checks -digits 6"]
    printed = _run(netlist, aim, lines)
    slack = re.search(r"^\s*(-?[\d.]+)\s+slack", printed, re.M)
    if slack is None:
        raise RuntimeError(f"sta reported no slack:\n{printed[-2000:]}")
    return period - float(slack[1])


def power(
    netlist: Netlist, timing: Timing, activity: Activity, aim: Target, *, period: float
) -> Power:
    """The cells' power by OpenSTA with the activities of a simulation."""
    cycles = (activity.stop - activity.start) / (period * 1000)
    cut, origin = _cut(netlist)

    def rate(net: Net) -> str:
        source = origin.get(net, net)
        if source == netlist.inputs["clock"][0]:
            return "2.0 0.5"
        duty = max(_duty(source, activity), _LEAST_DUTY)
        return f"{activity.toggles(source) / cycles:.6f} {duty:.6f}"

    lines = _design(cut, timing, aim, period, origin)
    for port, nets in cut.outputs.items():
        unit = aim.library.femtofarads_per_unit
        load = max(0.0, timing.loads[nets[0]] - aim.conditions.wire) / unit
        lines.append(f"set_load -pin_load {load:.9f} [get_ports {port}]")
    for net, bit in _input_bits(cut):
        lines.append(f"sta::set_power_input_port_activity {bit} {rate(net)}")
    for instance in cut.instances:
        for pin, net in instance.pins.items():
            if net != netlist.inputs["clock"][0]:
                where = f"[get_pins {instance.name}/{pin}]"
                lines.append(f"sta::set_power_pin_activity {where} {rate(net)}")
    printed = _run(cut, aim, [*lines, "report_power -digits 9"])
    total = re.search(r"^Total\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", printed, re.M)
    if total is None:
        raise RuntimeError(f"sta reported no power:\n{printed[-2000:]}")
    internal, switching, leakage = map(float, total.groups()[:3])
    return Power(internal=internal, switching=switching, leakage=leakage)


def _cut(netlist: Netlist) -> tuple[Netlist, dict[Net, Net]]:
    """The netlist cut behind the clock of clock gates and behind registers.

    Returns:
      The netlist, and the nets that its new input ports drive -> those that they stand for.
    """
    read = [
        instance.pins[pin.name]
        for instance in netlist.instances
        if instance.cell.flip_flop
        for pin in instance.cell.outputs
        if netlist.readers.get(instance.pins[pin.name])
    ]
    fresh = max(netlist.nets) + 1
    entering = {net: fresh + 1 + i for i, net in enumerate(read)}

    def cut(instance: Instance) -> Instance:
        gate = instance.cell.clock_gate
        inputs = {pin.name: instance.pins[pin.name] for pin in instance.cell.inputs}
        moved = {pin: entering.get(net, net) for pin, net in inputs.items()}
        if gate is not None:
            moved[gate.clock] = fresh
        return dataclasses.replace(instance, pins={**instance.pins, **moved})

    changed = dataclasses.replace(
        netlist,
        inputs={
            **netlist.inputs,
            "clock_of_gates": (fresh,),
            **{f"from_register_{net}": (inner,) for net, inner in entering.items()},
        },
        outputs={f"of_register_{net}": (net,) for net in entering},
        instances=tuple(map(cut, netlist.instances)),
    )
    origin = {inner: net for net, inner in entering.items()}
    return changed, {**origin, fresh: netlist.inputs["clock"][0]}


def _run(netlist: Netlist, aim: Target, commands: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "cells.lib").write_text(_library(aim))
        (directory / "netlist.v").write_text(structure(netlist))
        (directory / "report.tcl").write_text("\n".join(commands) + "\n")
        done = subprocess.run(
            ["sta", "-no_splash", "-exit", "report.tcl"],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode or "Error" in done.stdout:
        raise RuntimeError(f"sta failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def _library(aim: Target) -> str:
    """The library with the wire as a model, behind its units; conditions name one output."""
    text = read_text(aim.liberty)
    text = re.sub(r'(when\s*:\s*"[^"]*\bQ\b[^"]*?)\s*&\s*!?QN\b', r"\1", text)
    wire = aim.conditions.wire / aim.library.femtofarads_per_unit
    end = text.rindex("}")
    return text[:end] + _WIRE_LOAD.format(wire=wire) + text[end:]


def _input_bits(netlist: Netlist) -> list[tuple[Net, str]]:
    """Nets of input ports but the clock's, and Tcl for their bits."""
    return [
        (net, f"[get_ports {{{port}{f'[{i}]' if len(nets) > 1 else ''}}}]")
        for port, nets in netlist.inputs.items()
        for i, net in enumerate(nets)
        if port != "clock"
    ]


def _design(
    netlist: Netlist,
    timing: Timing,
    aim: Target,
    period: float,
    origin: Mapping[Net, Net] = MappingProxyType({}),
) -> list[str]:
    """Commands that read the design and describe what surrounds it."""
    slew = aim.conditions.clock_slew
    lines = [
        "read_liberty cells.lib",
        "read_verilog netlist.v",
        f"link_design {netlist.top}",
        f"create_clock -name clock -period {period} [get_ports clock]",
        f"set_clock_transition {slew} [get_clocks clock]",
        "set_wire_load_mode top",
        "set_wire_load_model -name bench",
    ]
    for net, bit in _input_bits(netlist):
        source = origin.get(net, net)
        for edge in EDGES:
            arrival, transition = timing.arrivals[source][edge], timing.slews[source][edge]
            lines.append(f"set_input_delay {arrival:.6f} -{edge} -clock clock {bit}")
            lines.append(f"set_input_transition {transition:.6f} -{edge} {bit}")
    return lines


def _duty(net: Net, activity: Activity) -> float:
    """Share of the window in which a net is high."""
    if isinstance(net, str):
        return float(net)
    edges = np.concatenate([[activity.start], activity.times[net], [activity.stop]])
    high = (np.arange(len(edges) - 1) + activity.first[net]) % 2 == 1
    return float(np.diff(edges)[high].sum() / (activity.stop - activity.start))

"""A second estimate of power and timing: OpenSTA on the same netlist with the same activities.

OpenSTA gets each pin's transitions per cycle and share of time high, and weighs conditional tables
by these shares as if pins were independent; the bench looks at the state at each change.
Loads are the same: the bench's wire is written as a wire-load model. Three things are arranged so
that both see the same circuit:

* Conditions that name both outputs of a register (``!D & !Q & QN``) lose the second, which says
  nothing new but would halve their probability.
* Clock gates take their clock from a port of their own. OpenSTA takes every pin that a clock
  reaches for clocked in every cycle; so it goes by the activities that it is given.
* Nets that no cell drives, those of input ports, are outside its report and of the comparison.

Activities of inner pins are honoured from version 2.2 (2020) on; an older one is refused.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.rtl.gate_simulation import Activity
from benchmarks.rtl.liberty import read_text
from benchmarks.rtl.netlist import Instance, Net, Netlist, structure
from benchmarks.rtl.synthesis import Target
from benchmarks.rtl.timing import EDGES, Timing

OLDEST = (2, 2)
_GATE_CLOCK = "clock_of_gates"
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
    slack = re.search(r"^\s*(-?[\d.]+)\s+slack", _run(netlist, aim, lines), re.M)
    if slack is None:
        raise RuntimeError("sta reported no slack")
    return period - float(slack[1])


def power(
    netlist: Netlist, timing: Timing, activity: Activity, aim: Target, *, period: float
) -> Power:
    """The cells' power by OpenSTA with the activities of a simulation."""
    cycles = (activity.stop - activity.start) / (period * 1000)
    apart, gate_clock = _with_gate_clock(netlist)

    def rate(net: Net) -> str:
        if net == gate_clock:
            return "2.0 0.5"
        return f"{activity.toggles(net) / cycles:.6f} {_duty(net, activity):.6f}"

    lines = _design(apart, timing, aim, period)
    for net, bit in _input_bits(apart):
        lines.append(f"sta::set_power_input_port_activity {bit} {rate(net)}")
    for instance in apart.instances:
        for pin, net in instance.pins.items():
            if net != apart.inputs["clock"][0]:
                where = f"[get_pins {instance.name}/{pin}]"
                lines.append(f"sta::set_power_pin_activity {where} {rate(net)}")
    printed = _run(apart, aim, [*lines, "report_power -digits 9"])
    total = re.search(r"^Total\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", printed, re.M)
    if total is None:
        raise RuntimeError(f"sta reported no power:\n{printed[-2000:]}")
    internal, switching, leakage = map(float, total.groups()[:3])
    return Power(internal=internal, switching=switching, leakage=leakage)


def _with_gate_clock(netlist: Netlist) -> tuple[Netlist, Net]:
    """The netlist with another clock port for its clock gates, and its net."""
    fresh = max(netlist.nets) + 1

    def apart(instance: Instance) -> Instance:
        gate = instance.cell.clock_gate
        if gate is None:
            return instance
        return dataclasses.replace(instance, pins={**instance.pins, gate.clock: fresh})

    changed = dataclasses.replace(
        netlist,
        inputs={**netlist.inputs, _GATE_CLOCK: (fresh,)},
        instances=tuple(map(apart, netlist.instances)),
    )
    return changed, fresh


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


def _design(netlist: Netlist, timing: Timing, aim: Target, period: float) -> list[str]:
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
    clock = dict.fromkeys(EDGES, 0.0)
    for net, bit in _input_bits(netlist):
        for edge in EDGES:
            arrival = timing.arrivals.get(net, clock)[edge]
            transition = timing.slews[net][edge] if net in timing.slews else slew
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

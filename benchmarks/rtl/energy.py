"""Energy of a simulated netlist from a Liberty file's tables.

Every change of a net charges or discharges its pins and wire, ½CV². What a cell takes inside is
looked up by edge, input slew and load, from the input that caused the output's change, and by the
state of the other pins where the table has conditions (``when``): a register's clock edge costs
more where its input differs from its output. Leakage is that of the states seen.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.gate_simulation import Activity, compiled
from benchmarks.rtl.liberty import Pin
from benchmarks.rtl.netlist import Instance, Net, Netlist
from benchmarks.rtl.timing import EDGES, Timing

KINDS = ("switching", "internal", "leakage")
# Blocks of combinational cells: a cell belongs to the last block one of whose signals it depends
# on, be it a register's output or an input port. Anything else decides only when things happen.
Blocks = Sequence[tuple[str, str]]
MULTIPLIER_BLOCKS: Blocks = (
    ("multiplier", r"activation|weight|digit|booth"),
    ("psum adder", r"psum"),
)
TERM_BLOCKS: Blocks = (
    ("selector", r"activation|index|select|valid|terms"),
    ("shifter", r"exponent|sign|negative|shift"),
    ("group adder", r"(?:^|\.)(?:sum|carry|accumulator|total|acc)"),
    ("psum adder", r"psum"),
)
EDGE_BLOCKS: Blocks = (("encoder", r"weights"), ("serialiser", r"pending|negative"))
REGISTERS = (
    ("psum registers", r"psum"),
    ("activation registers", r"activation"),
    ("term registers", r"valid|sign|exponent|index|last|term|select|weight|slot"),
    ("serialiser", r"pending|negative"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energy:
    """fJ in the measured window, by block and then by kind."""

    by_block: Mapping[str, Mapping[str, float]]

    @property
    def total(self) -> float:
        """fJ of all blocks."""
        return sum(sum(kinds.values()) for kinds in self.by_block.values())

    def of(self, kind: str) -> float:
        """fJ of one kind over all blocks."""
        return sum(kinds[kind] for kinds in self.by_block.values())


def measure(
    netlist: Netlist,
    timing: Timing,
    activity: Activity,
    voltage: float,
    blocks: Blocks = TERM_BLOCKS,
) -> Energy:
    """Energy of what happened in the window.

    Clock nets, the clock pins of registers and whole clock gates are the block ``clock``; nets of
    input ports are ``inputs``: the neighbour's registers drive them, the load is here.
    """
    block_names = block_of(netlist, blocks)
    total: dict[str, dict[str, float]] = collections.defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for net in netlist.nets:
        driver = netlist.drivers.get(net)
        block = "inputs" if driver is None else block_names[driver[0].name]
        block = "clock" if net in netlist.clock_nets else block
        total[block]["switching"] += half_cv2_of([net], timing, activity, voltage)
    samples = _samples(activity)
    for instance in netlist.instances:
        block = block_names[instance.name]
        for pin in instance.cell.inputs:
            if pin.power:
                on_clock = instance.pins[pin.name] in netlist.clock_nets
                spent = _input_energy(instance, pin, timing, activity)
                total["clock" if on_clock else block]["internal"] += spent
        for pin in instance.cell.outputs:
            total[block]["internal"] += _output_energy(instance, pin, timing, activity)
        total[block]["leakage"] += (
            _leakage(instance, activity, samples) * (activity.stop - activity.start) * 1e-6
        )
    return Energy(by_block=total)


def half_cv2_of(nets: Iterable[Net], timing: Timing, activity: Activity, voltage: float) -> float:
    """fJ of switching of some nets."""
    return sum(0.5 * timing.loads[net] * voltage**2 * activity.toggles(net) for net in nets)


def block_of(netlist: Netlist, blocks: Blocks) -> dict[str, str]:
    """Instance -> block: by its name for a register, by what it depends on for other cells."""
    sources: dict[Net, frozenset[str]] = {"0": frozenset(), "1": frozenset()}
    sources |= {net: frozenset({port}) for net, port in netlist.input_nets.items()}
    found = {}
    for instance in netlist.instances:
        if instance.cell.clock_gate:
            found[instance.name] = "clock"
            sources[instance.pins[instance.cell.clock_gate.output]] = frozenset()
        elif instance.cell.flip_flop:
            nets = [instance.pins[pin.name] for pin in instance.cell.outputs]
            name = next((netlist.names[n] for n in nets if n in netlist.names), "")
            sources |= dict.fromkeys(nets, frozenset({re.sub(r"\[\d+\]$", "", name)}))
            found[instance.name] = _first(REGISTERS, name, "sum registers")
    for instance in netlist.combinational():
        known = frozenset[str]().union(
            *(sources[instance.pins[p.name]] for p in instance.cell.inputs)
        )
        sources |= {instance.pins[pin.name]: known for pin in instance.cell.outputs}
        matched = [b for b, pattern in blocks if any(re.search(pattern, name) for name in known)]
        found[instance.name] = matched[-1] if matched else "control"
    return found


def _first(patterns: Sequence[tuple[str, str]], name: str, default: str) -> str:
    return next((block for block, pattern in patterns if re.search(pattern, name)), default)


def _mean_slew(timing: Timing, net: Net) -> float:
    slews = timing.slews.get(net)
    return 0.0 if slews is None else sum(slews.values()) / 2


def _input_energy(instance: Instance, pin: Pin, timing: Timing, activity: Activity) -> float:
    """What changes of one input cost inside, its output's change apart."""
    net = instance.pins[pin.name]
    if isinstance(net, str) or not activity.toggles(net):
        return 0.0
    times = activity.times[net]
    rising = ~activity.before(net, times)
    values = {p: activity.before(n, times) for p, n in instance.pins.items()}
    spent = 0.0
    for power in pin.power:
        held = compiled(power.when)(values) if power.when else np.full(len(times), True)
        slew = timing.slews[net]
        for edge, count in zip(EDGES, _edges(rising, held), strict=True):
            if count and edge in power.tables:
                spent += count * power.tables[edge].at(slew=slew[edge])
    return spent


def _output_energy(instance: Instance, pin: Pin, timing: Timing, activity: Activity) -> float:
    """What changes of one output cost inside, each by the input that changed last before it."""
    net = instance.pins[pin.name]
    times = activity.times.get(net)
    if times is None or not len(times) or not pin.power:
        return 0.0
    rising = ~activity.before(net, times)
    values = {p: activity.after(n, times) for p, n in instance.pins.items()}
    related = list(dict.fromkeys(power.related for power in pin.power if power.related))
    cause = np.zeros(len(times), int)
    if len(related) > 1:
        changes = [activity.last_change(instance.pins[name], times) for name in related]
        cause = np.argmax(np.stack(changes), axis=0)
    spent = 0.0
    for power in pin.power:
        held = compiled(power.when)(values) if power.when else np.full(len(times), True)
        slew = 0.0
        if power.related:
            held = held & (cause == related.index(power.related))
            slew = _mean_slew(timing, instance.pins[power.related])
        for edge, count in zip(EDGES, _edges(rising, held), strict=True):
            if count and edge in power.tables:
                spent += count * power.tables[edge].at(slew=slew, load=timing.loads[net])
    return spent


def _edges(rising: npt.NDArray[np.bool_], held: npt.NDArray[np.bool_]) -> tuple[int, int]:
    return int((rising & held).sum()), int((~rising & held).sum())


def _samples(activity: Activity, count: int = 997) -> npt.NDArray[np.int64]:
    """Evenly spaced times of the window, not in step with the clock."""
    return np.linspace(activity.start, activity.stop, count, endpoint=False).astype(np.int64)


def _leakage(instance: Instance, activity: Activity, samples: npt.NDArray[np.int64]) -> float:
    """Mean leakage in nW over the states of the pins at the samples."""
    cell = instance.cell
    if not cell.leakage_when:
        return cell.leakage
    values = {p: activity.after(n, samples) for p, n in instance.pins.items()}
    leak, seen = 0.0, np.zeros(len(samples), bool)
    for when, value in cell.leakage_when:
        held = compiled(when)(values) & ~seen
        leak += value * held.mean()
        seen |= held
    return leak + cell.leakage * (~seen).mean()

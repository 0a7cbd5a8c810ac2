"""Static timing of a netlist: loads, slews, delays and the shortest period of the clock.

The clock is ideal: it reaches every register and clock gate at once, with one slew. Inputs come
from a flip-flop of the neighbour, outputs go to one. Slews are the worst of a cell's arcs, as in
static timing analysis; the simulation's delays are means over the arcs.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.rtl.liberty import Arc, Cell
from benchmarks.rtl.netlist import Instance, Net, Netlist

EDGES = ("rise", "fall")
Edges = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """What surrounds the cells.

    Attributes:
      wire: fF of wire per pin that a net enters.
      clock_slew: ns, at every clock pin.
      output_load: fF at each output port, for delays: a pin and its wire in the next PE.
    """

    wire: float
    clock_slew: float
    output_load: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Result of the static pass; times in ns, loads in fF.

    Attributes:
      loads: net -> capacitance of pins and wire, without what lies beyond output ports.
      slews: net -> edge -> slew.
      delays: net -> edge -> delay of its driver, mean over the arcs.
      arrivals: net -> edge -> latest arrival after the clock's edge.
      period: the shortest period of the clock.
      input_delay: from the clock's edge to a change of an input, mean over the ports.
      endpoint: where the longest path ends.
    """

    loads: Mapping[Net, float]
    slews: Mapping[Net, Edges]
    delays: Mapping[Net, Edges]
    arrivals: Mapping[Net, Edges]
    period: float
    input_delay: float
    endpoint: str


def analyse(netlist: Netlist, conditions: Conditions) -> Timing:
    """The static pass over a netlist."""
    loads = net_loads(netlist, conditions)
    outputs = {net for nets in netlist.outputs.values() for net in nets}
    total = {n: c + conditions.output_load * (n in outputs) for n, c in loads.items()}
    clock = dict.fromkeys(EDGES, conditions.clock_slew)
    slews: dict[Net, Edges] = {net: clock for net in netlist.clock_nets}
    arrivals: dict[Net, Edges] = {net: dict.fromkeys(EDGES, 0.0) for net in netlist.clock_nets}
    delays: dict[Net, Edges] = {}

    registers = [i for i in netlist.instances if i.cell.flip_flop]
    neighbour = _neighbour(registers)
    for net in netlist.input_nets:
        if net not in slews:
            slews[net], arrivals[net] = _launch(neighbour, total[net], conditions.clock_slew)
    launched = [
        np.mean(list(arrivals[n].values()))
        for n in netlist.input_nets
        if n not in netlist.clock_nets
    ]
    for register in registers:
        for pin in register.cell.outputs:
            net = register.pins[pin.name]
            slews[net], arrivals[net] = _launch(
                (register.cell, pin.name), total[net], conditions.clock_slew
            )
            delays[net] = arrivals[net]
    for constant in ("0", "1"):
        slews[constant] = dict.fromkeys(EDGES, 0.0)
        arrivals[constant] = dict.fromkeys(EDGES, -np.inf)
    for instance in netlist.combinational():
        for pin in instance.cell.outputs:
            net = instance.pins[pin.name]
            slews[net], arrivals[net], delays[net] = _propagate(
                instance, pin.arcs, total[net], slews, arrivals
            )
    period, endpoint = max(_ends(netlist, conditions, slews, arrivals, neighbour))
    return Timing(
        loads=loads,
        slews=slews,
        delays=delays,
        arrivals=arrivals,
        period=period,
        input_delay=float(np.mean(launched)) if launched else 0.0,
        endpoint=endpoint,
    )


def net_loads(netlist: Netlist, conditions: Conditions) -> dict[Net, float]:
    """fF on each net: the pins that it enters and wire for each of them."""
    return {
        net: sum(
            instance.cell.pins[pin].capacitance + conditions.wire
            for instance, pin in netlist.readers.get(net, [])
        )
        for net in netlist.nets
    }


def _neighbour(registers: list[Instance]) -> tuple[Cell, str] | None:
    """The flip-flop of the PEs around: the netlist's most frequent one, and its output."""
    if not registers:
        return None
    kinds = collections.Counter(register.cell.name for register in registers)
    cell = next(r.cell for r in registers if r.cell.name == kinds.most_common(1)[0][0])
    return cell, next(p.name for p in cell.outputs if p.function == cell.flip_flop.states[0])


def _launch(source: tuple[Cell, str] | None, load: float, clock_slew: float) -> tuple[Edges, Edges]:
    """Slew and arrival at a flip-flop's output; without a flip-flop, a step at once."""
    if source is None:
        return dict.fromkeys(EDGES, clock_slew), dict.fromkeys(EDGES, 0.0)
    cell, pin = source
    arcs = [arc for arc in cell.pins[pin].arcs if arc.kind in ("rising_edge", "falling_edge")]
    at = {"slew": clock_slew, "load": load}
    slew = {e: max(arc.tables[f"{e}_transition"].at(**at) for arc in arcs) for e in EDGES}
    delay = {e: max(arc.tables[f"cell_{e}"].at(**at) for arc in arcs) for e in EDGES}
    return slew, delay


def _propagate(
    instance: Instance,
    arcs: tuple[Arc, ...],
    load: float,
    slews: Mapping[Net, Edges],
    arrivals: Mapping[Net, Edges],
) -> tuple[Edges, Edges, Edges]:
    slew, arrival, delay = {}, {}, {}
    for edge in EDGES:
        table, transition = f"cell_{edge}", f"{edge}_transition"
        found = []  # (slew, arrival, delay)
        for arc in arcs:
            if table not in arc.tables:
                continue
            net = instance.pins[arc.related]
            for cause in _causes(arc.sense, edge):
                at = {"slew": slews[net][cause], "load": load}
                took = arc.tables[table].at(**at)
                found.append((arc.tables[transition].at(**at), arrivals[net][cause] + took, took))
        if not found:  # a cell without inputs ties its output
            found = [(0.0, -np.inf, 0.0)]
        slew[edge] = max(row[0] for row in found)
        arrival[edge] = max(row[1] for row in found)
        delay[edge] = float(np.mean([row[2] for row in found]))
    return slew, arrival, delay


def _causes(sense: str, edge: str) -> tuple[str, ...]:
    other = EDGES[edge == "rise"]
    return {"positive_unate": (edge,), "negative_unate": (other,)}.get(sense, EDGES)


def _ends(
    netlist: Netlist,
    conditions: Conditions,
    slews: Mapping[Net, Edges],
    arrivals: Mapping[Net, Edges],
    neighbour: tuple[Cell, str] | None,
) -> Iterator[tuple[float, str]]:
    """Arrival plus setup, and where, at every register, clock gate and output port."""

    def needed(cell: Cell, pin: str, net: Net) -> float | None:
        times = setup(cell, pin, slews[net], conditions.clock_slew)
        return times and max(arrivals[net][edge] + times[edge] for edge in EDGES)

    for instance in netlist.instances:
        if instance.cell.flip_flop or instance.cell.clock_gate:
            output = instance.pins[instance.cell.outputs[0].name]
            for pin in instance.cell.inputs:
                period = needed(instance.cell, pin.name, instance.pins[pin.name])
                if period is not None:
                    yield period, netlist.names.get(output, instance.name)
    for port, nets in netlist.outputs.items():
        for net in nets:
            if neighbour is None:
                yield max(arrivals[net].values()), f"output {port}"
            else:
                yield needed(neighbour[0], _data_pin(neighbour[0]), net) or 0.0, f"output {port}"


def _data_pin(cell: Cell) -> str:
    return next(p.name for p in cell.inputs if any(a.kind.startswith("setup") for a in p.arcs))


def setup(cell: Cell, pin: str, slews: Edges, clock_slew: float) -> Edges | None:
    """Setup time of a pin by edge in ns; None if it has none."""
    arcs = [arc for arc in cell.pins[pin].arcs if arc.kind.startswith("setup")]
    if not arcs:
        return None
    return {
        edge: max(
            arc.tables[f"{edge}_constraint"].at(constrained=slews[edge], related=clock_slew)
            for arc in arcs
        )
        for edge in EDGES
    }

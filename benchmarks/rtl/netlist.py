"""Mapped netlists: instances of standard cells and single-bit nets."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.rtl.liberty import Cell, Library, expression

Net = int | str  # a number, or a constant "0" or "1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance:
    """A standard cell of a netlist; every output has a net, if only one that nobody reads."""

    name: str
    cell: Cell
    pins: Mapping[str, Net]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Netlist:
    """A module of standard cells.

    Attributes:
      top: its name.
      inputs: port -> nets, least significant first; so are outputs.
      instances: in a fixed order.
      names: net -> the name of a signal of the Verilog source, where one has survived.
    """

    top: str
    inputs: Mapping[str, tuple[Net, ...]]
    outputs: Mapping[str, tuple[Net, ...]]
    instances: tuple[Instance, ...]
    names: Mapping[int, str]

    @property
    def area(self) -> float:
        """Cells' area in the library's unit."""
        return sum(instance.cell.area for instance in self.instances)

    @functools.cached_property
    def drivers(self) -> dict[Net, tuple[Instance, str]]:
        """Net -> the instance and pin that drive it; input ports are not among them."""
        return {i.pins[p.name]: (i, p.name) for i in self.instances for p in i.cell.outputs}

    @functools.cached_property
    def readers(self) -> dict[Net, list[tuple[Instance, str]]]:
        """Net -> the instances and pins that it enters."""
        readers: dict[Net, list[tuple[Instance, str]]] = {}
        for instance in self.instances:
            for pin in instance.cell.inputs:
                readers.setdefault(instance.pins[pin.name], []).append((instance, pin.name))
        return readers

    @functools.cached_property
    def input_nets(self) -> dict[Net, str]:
        """Nets of input ports -> the port."""
        return {net: port for port, nets in self.inputs.items() for net in nets}

    @functools.cached_property
    def clock_nets(self) -> frozenset[Net]:
        """The clock's net and those behind clock gates."""
        gates = (i for i in self.instances if i.cell.clock_gate)
        behind = {i.pins[i.cell.clock_gate.output] for i in gates if i.cell.clock_gate}
        return frozenset({net for net in self.inputs.get("clock", ())} | behind)

    @functools.cached_property
    def nets(self) -> tuple[int, ...]:
        """All nets that are no constants, in order."""
        found = {net for nets in (*self.inputs.values(), *self.outputs.values()) for net in nets}
        found |= {net for instance in self.instances for net in instance.pins.values()}
        return tuple(sorted(net for net in found if isinstance(net, int)))

    def combinational(self) -> Iterator[Instance]:
        """Instances that are neither flip-flops nor clock gates, drivers before readers.

        Raises:
          ValueError: a combinational loop.
        """
        waiting = {
            i.name: i for i in self.instances if not i.cell.flip_flop and not i.cell.clock_gate
        }
        known = {
            net for net in self.nets if net not in self.drivers
        } | {"0", "1"} | {
            net for net, (i, _) in self.drivers.items() if i.name not in waiting
        }  # fmt: skip
        while waiting:
            ready = [
                i
                for i in waiting.values()
                if all(i.pins[pin.name] in known for pin in i.cell.inputs)
            ]
            if not ready:
                raise ValueError(f"{self.top} has a combinational loop at {next(iter(waiting))}")
            for instance in ready:
                del waiting[instance.name]
                known.update(instance.pins[pin.name] for pin in instance.cell.outputs)
                yield instance


def read_netlist(path: str | Path, library: Library) -> Netlist:
    """Reads what Yosys' ``write_json`` makes of one flat mapped module.

    Raises:
      ValueError: cells that the library lacks, or undefined constants.
    """
    modules = json.loads(Path(path).read_text())["modules"]
    ((top, module),) = ((n, m) for n, m in modules.items() if "top" in m["attributes"])
    missing = sorted({c["type"] for c in module["cells"].values()} - set(library.cell_names))
    if missing:
        raise ValueError(f"{top}: {library.name} has no cell {', '.join(missing)}")
    fresh = 1 + max(
        bit for net in module["netnames"].values() for bit in net["bits"] if isinstance(bit, int)
    )
    instances = []
    for number, cell in enumerate(module["cells"].values()):
        kind = library.cell(cell["type"])
        pins: dict[str, Net] = {}
        for pin in (*kind.inputs, *kind.outputs):
            bits = cell["connections"].get(pin.name)
            pins[pin.name] = bits[0] if bits else fresh
            fresh += not bits
        instances.append(Instance(name=f"u{number}", cell=kind, pins=pins))
    ports = module["ports"]
    return Netlist(
        top=top,
        inputs={n: tuple(p["bits"]) for n, p in ports.items() if p["direction"] == "input"},
        outputs={n: tuple(p["bits"]) for n, p in ports.items() if p["direction"] == "output"},
        instances=tuple(instances),
        names=_names(module["netnames"]),
    )


def _names(netnames: Mapping[str, Mapping]) -> dict[int, str]:
    names: dict[int, str] = {}
    public = [(name, net["bits"]) for name, net in netnames.items() if not net["hide_name"]]
    for name, bits in sorted(public, key=lambda item: (len(item[0]), item[0])):
        for position, bit in enumerate(bits):
            if isinstance(bit, int):
                names.setdefault(bit, f"{name}[{position}]" if len(bits) > 1 else name)
    return names


def size_clock_gates(netlist: Netlist, library: Library, wire: float) -> Netlist:
    """Each clock gate in the smallest drive that may carry its load; else in the largest.

    Args:
      netlist: with the clock gates that synthesis chose, without regard to their load.
      library: its library.
      wire: fF of wire per pin that a net enters.
    """

    def sized(instance: Instance) -> Instance:
        gate = instance.cell.clock_gate
        if gate is None:
            return instance
        readers = netlist.readers.get(instance.pins[gate.output], [])
        load = sum(reader.cell.pins[pin].capacitance + wire for reader, pin in readers)
        choices = library.clock_gates(gate.kind)
        fitting = [c for c in choices if c.pins[gate.output].max_load >= load]
        return dataclasses.replace(instance, cell=(fitting or choices[-1:])[0])

    return dataclasses.replace(netlist, instances=tuple(map(sized, netlist.instances)))


def net_name(net: Net) -> str:
    """The wire of a net in written Verilog."""
    return f"n{net}" if isinstance(net, int) else f"1'b{net}"


def structure(netlist: Netlist) -> str:
    """Structural Verilog: nets are called n1, n2, … and ports have aliases of single bits."""
    lines = [f"module {netlist.top} ("]
    ports = [
        f"    {direction} {f'[{len(nets) - 1}:0] ' if len(nets) > 1 else ''}{port}"
        for direction, group in (("input", netlist.inputs), ("output", netlist.outputs))
        for port, nets in group.items()
    ]
    lines += [",\n".join(ports), ");", *port_aliases(netlist)]
    for instance in netlist.instances:
        pins = ", ".join(f".{pin}({net_name(net)})" for pin, net in instance.pins.items())
        lines.append(f"    {instance.cell.name} {instance.name} ({pins});")
    return "\n".join([*lines, "endmodule", ""])


def port_aliases(netlist: Netlist, *, declared: frozenset[Net] = frozenset()) -> list[str]:
    """Wires for all nets that are not declared yet, joined to the ports."""
    lines = [f"    wire n{net};" for net in netlist.nets if net not in declared]
    for port, nets in netlist.inputs.items():
        for i, net in enumerate(nets):
            lines.append(f"    assign {net_name(net)} = {port}{f'[{i}]' if len(nets) > 1 else ''};")
    for port, nets in netlist.outputs.items():
        for i, net in enumerate(nets):
            lines.append(f"    assign {port}{f'[{i}]' if len(nets) > 1 else ''} = {net_name(net)};")
    return lines


def pin_expression(instance: Instance, function: str) -> str:
    """A Liberty function of an instance's pins as Verilog over the netlist's nets."""
    text = expression(function, "<{}>")
    for pin, net in instance.pins.items():
        text = text.replace(f"<{pin}>", net_name(net))
    return text

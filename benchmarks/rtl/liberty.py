"""Liberty files: cells, pins, timing and internal power, and their look-up tables.

Only what a static pass over a netlist and a sum of energies need, after the Liberty User Guide,
vol. 1. Numbers come in ns, fF, fJ and nW, whatever the file's units. Cells are parsed when they are
asked for: a library has hundreds, a netlist uses a few dozen.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_TOKEN = re.compile(r'"[^"]*"|[{}();:,]|[^\s{}();:,"]+')
_CELL = re.compile(r'\bcell\s*\(\s*"?([\w$]+)"?\s*\)\s*\{')
_AXES = {
    "input_net_transition": "slew",
    "input_transition_time": "slew",
    "total_output_net_capacitance": "load",
    "constrained_pin_transition": "constrained",
    "related_pin_transition": "related",
}
_EDGES = ("rise", "fall")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A group statement: its arguments, attributes and groups inside, in order."""

    kind: str
    arguments: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    groups: tuple[Group, ...]

    def value(self, name: str, default: str = "") -> str:
        """A simple attribute's text."""
        return self.attributes.get(name, (default,))[0]

    def number(self, name: str, default: float = 0.0) -> float:
        """A simple attribute's number."""
        return float(self.value(name) or default)

    def all(self, kind: str) -> Iterator[Group]:
        """The groups of one kind directly inside."""
        return (group for group in self.groups if group.kind == kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Values over no, one or two axes of ``slew``, ``load``, ``constrained`` and ``related``."""

    axes: tuple[str, ...]
    points: tuple[npt.NDArray[np.float64], ...]
    values: npt.NDArray[np.float64]

    def at(self, **where: float) -> float:
        """Linear interpolation along each axis, continued beyond the table's ends."""
        values = self.values
        for axis, points in zip(self.axes, self.points, strict=True):
            low = min(max(int(np.searchsorted(points, where[axis])) - 1, 0), len(points) - 2)
            share = (where[axis] - points[low]) / (points[low + 1] - points[low])
            values = values[low] + share * (values[low + 1] - values[low])
        return float(values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arc:
    """Timing from one pin to another, or a constraint; tables by the file's own names."""

    related: str
    kind: str  # timing_type; combinational if the file says nothing
    sense: str
    when: str | None
    tables: Mapping[str, Table]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternalPower:
    """Energy per edge in fJ: of one input if ``related``, in one state of the pins if ``when``."""

    related: str | None
    when: str | None
    tables: Mapping[str, Table]  # by edge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin:
    """A pin: capacitance and largest load in fF."""

    name: str
    direction: str
    capacitance: float
    max_load: float
    function: str | None
    arcs: tuple[Arc, ...]
    power: tuple[InternalPower, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipFlop:
    """State names and expressions of pins."""

    states: tuple[str, str]
    clocked_on: str
    next_state: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockGate:
    """Pins of an integrated clock gate."""

    kind: str  # clock_gating_integrated_cell
    clock: str
    enable: str
    output: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A standard cell: area in the file's unit (µm²), leakage in nW by state or as a whole."""

    name: str
    area: float
    leakage: float
    leakage_when: tuple[tuple[str, float], ...]
    pins: Mapping[str, Pin]
    flip_flop: FlipFlop | None
    clock_gate: ClockGate | None

    @property
    def inputs(self) -> tuple[Pin, ...]:
        """Input pins."""
        return tuple(pin for pin in self.pins.values() if pin.direction == "input")

    @property
    def outputs(self) -> tuple[Pin, ...]:
        """Output pins."""
        return tuple(pin for pin in self.pins.values() if pin.direction == "output")


class Library:
    """A Liberty file.

    Attributes:
      name, revision: as the file has them.
      voltage: nominal supply in volts.
      femtofarads_per_unit: the file's unit of capacitance.

    Raises:
      ValueError: the file is no Liberty library, or in units that this reader does not know.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S).replace("\\\n", " ")
        spans = list(_cell_spans(text))
        self._texts = {name: text[start:stop] for name, start, stop in spans}
        edges = [0, *(edge for _, start, stop in spans for edge in (start, stop)), len(text)]
        header = "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        root = _parse(header)
        if root.kind != "library":
            raise ValueError("no Liberty library: the file does not begin with library (...)")
        self.name = root.arguments[0]
        self.revision = root.value("revision")
        self.voltage = _nominal_voltage(root)
        self._units = _units(root)
        self.femtofarads_per_unit = self._units.femtofarad
        self._templates = {
            group.arguments[0]: group for group in root.groups if group.kind.endswith("template")
        }

    def __contains__(self, name: str) -> bool:
        return name in self._texts

    @property
    def cell_names(self) -> tuple[str, ...]:
        """All cells of the library."""
        return tuple(self._texts)

    @functools.cache  # noqa: B019  a library lives as long as the program
    def cell(self, name: str) -> Cell:
        """A cell by name; KeyError if there is none."""
        return _cell(_parse(self._texts[name]), self._units, self._templates)

    def clock_gates(self, kind: str) -> list[Cell]:
        """Integrated clock gates of one kind, smallest first."""
        marked = [n for n, text in self._texts.items() if "clock_gating_integrated_cell" in text]
        cells = [self.cell(name) for name in marked]
        return sorted(
            (c for c in cells if c.clock_gate and c.clock_gate.kind == kind), key=lambda c: c.area
        )


def read_library(path: str | Path) -> Library:
    """Reads a .lib or .lib.gz file."""
    return Library(read_text(path))


def read_text(path: str | Path) -> str:
    """The text of a file, unpacked if its name ends in .gz."""
    path = Path(path)
    return gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()


def expression(text: str, name: str = "{}") -> str:
    """A Liberty function with ~ & ^ | and all parentheses, valid in Verilog and in Python.

    Args:
      text: with ``!`` or a ``'`` behind for not, ``*``, ``&`` or a blank for and, ``^`` for
        exclusive or, ``+`` or ``|`` for or, in the order in which they bind.
      name: how a pin is written, a format of its name.
    """
    tokens = re.findall(r"[\w\[\]]+|[!'()*&^+|]", text)
    result, rest = _or(tokens, name)
    if rest:
        raise ValueError(f"cannot read the Liberty expression {text!r} from {rest[0]!r} on")
    return result


def pins_of(text: str) -> tuple[str, ...]:
    """The pins named in a Liberty function."""
    return tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)))


def _or(tokens: list[str], name: str) -> tuple[str, list[str]]:
    left, rest = _and(tokens, name)
    while rest and rest[0] in "+|":
        right, rest = _and(rest[1:], name)
        left = f"({left} | {right})"
    return left, rest


def _and(tokens: list[str], name: str) -> tuple[str, list[str]]:
    left, rest = _xor(tokens, name)
    while rest and rest[0] not in ("+", "|", ")", "^"):
        right, rest = _xor(rest[1:] if rest[0] in "*&" else rest, name)
        left = f"({left} & {right})"
    return left, rest


def _xor(tokens: list[str], name: str) -> tuple[str, list[str]]:
    left, rest = _not(tokens, name)
    while rest and rest[0] == "^":
        right, rest = _not(rest[1:], name)
        left = f"({left} ^ {right})"
    return left, rest


def _not(tokens: list[str], name: str) -> tuple[str, list[str]]:
    if not tokens:
        raise ValueError("a Liberty expression ends too early")
    if tokens[0] == "!":
        inner, rest = _not(tokens[1:], name)
        return f"(~{inner})", rest
    if tokens[0] == "(":
        inner, rest = _or(tokens[1:], name)
        if not rest or rest[0] != ")":
            raise ValueError("a Liberty expression lacks a closing parenthesis")
        rest = rest[1:]
    else:
        inner, rest = name.format(tokens[0]), tokens[1:]
    while rest and rest[0] == "'":
        inner, rest = f"(~{inner})", rest[1:]
    return inner, rest


def _cell_spans(text: str) -> Iterator[tuple[str, int, int]]:
    brace = re.compile(r"[{}]")
    position = 0
    while match := _CELL.search(text, position):
        depth, position = 1, match.end()
        while depth:
            found = brace.search(text, position)
            if found is None:
                raise ValueError(f"cell {match[1]} has no end")
            depth += 1 if found[0] == "{" else -1
            position = found.end()
        yield match[1], match.start(), position


def _parse(text: str) -> Group:
    tokens = _TOKEN.findall(text)
    group, _ = _statement(tokens, 0)
    if not isinstance(group, Group):
        raise ValueError("no Liberty group where one was expected")
    return group


def _statement(
    tokens: Sequence[str], at: int
) -> tuple[Group | tuple[str, tuple[str, ...]] | None, int]:
    """A group, or an attribute's name and values, and where the next statement begins."""
    if at + 1 >= len(tokens):
        raise ValueError("a Liberty statement ends too early")
    name = tokens[at]
    if name == ";":
        return None, at + 1
    if tokens[at + 1] == ":":
        return (name, (tokens[at + 2].strip('"'),)), at + 3
    if tokens[at + 1] != "(":
        raise ValueError(f"cannot read a Liberty statement at {name!r}")
    end = at + 2
    while tokens[end] != ")":
        end += 1
    arguments = tuple(t.strip('"') for t in tokens[at + 2 : end] if t != ",")
    if end + 1 >= len(tokens) or tokens[end + 1] != "{":
        return (name, arguments), end + 1
    attributes: dict[str, tuple[str, ...]] = {}
    groups: list[Group] = []
    at = end + 2
    while tokens[at] != "}":
        found, at = _statement(tokens, at)
        if isinstance(found, Group):
            groups.append(found)
        elif found is not None:
            attributes[found[0]] = found[1]
    group = Group(kind=name, arguments=arguments, attributes=attributes, groups=tuple(groups))
    return group, at + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Units:
    ns: float
    femtofarad: float
    nanowatt: float
    femtojoule: float  # of internal energies, whose unit is capacitance times voltage squared


_PREFIXES = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}


def _quantity(text: str, unit: str) -> float:
    match = re.fullmatch(rf"([\d.]+)\s*([fpnum]?){unit}", text.strip(), re.I)
    if match is None:
        raise ValueError(f"cannot read the Liberty unit {text!r}")
    return float(match[1]) * _PREFIXES[match[2].lower()]


def _units(root: Group) -> _Units:
    load, prefix = root.attributes.get("capacitive_load_unit", ("1", "pf"))
    farad = _quantity(f"{load}{prefix}", "f")
    volt = _quantity(root.value("voltage_unit", "1V"), "V")
    return _Units(
        ns=_quantity(root.value("time_unit", "1ns"), "s") / 1e-9,
        femtofarad=farad / 1e-15,
        nanowatt=_quantity(root.value("leakage_power_unit", "1nW"), "W") / 1e-9,
        femtojoule=farad * volt**2 / 1e-15,
    )


def _nominal_voltage(root: Group) -> float:
    for conditions in root.all("operating_conditions"):
        if "voltage" in conditions.attributes:
            return conditions.number("voltage")
    voltage = root.number("nom_voltage")
    if not voltage:
        raise ValueError("the Liberty library names no supply voltage")
    return voltage


def _numbers(texts: Sequence[str]) -> list[float]:
    return [
        float(number) for text in texts for number in re.split(r"[\s,]+", text.strip()) if number
    ]


def _table(group: Group, templates: Mapping[str, Group], scales: Mapping[str, float]) -> Table:
    """Scales are the factors of an axis' unit, and of the values' under ``value``."""
    name = group.arguments[0] if group.arguments else "scalar"
    values = np.array(_numbers(group.attributes["values"])) * scales["value"]
    if name == "scalar" or values.size == 1:
        return Table(axes=(), points=(), values=values[0])
    template = templates[name]
    axes, points = [], []
    for i in (1, 2, 3):
        variable = template.value(f"variable_{i}")
        if not variable:
            break
        index = group.attributes.get(f"index_{i}") or template.attributes[f"index_{i}"]
        axis = _AXES.get(variable, variable)
        unit = scales["load"] if axis == "load" else scales["time"]
        axes.append(axis)
        points.append(np.array(_numbers(index)) * unit)
    return Table(
        axes=tuple(axes), points=tuple(points), values=values.reshape([len(p) for p in points])
    )


def _tables(
    group: Group, templates: Mapping[str, Group], units: _Units, value: float
) -> dict[str, Table]:
    scales = {"value": value, "time": units.ns, "load": units.femtofarad}
    return {g.kind: _table(g, templates, scales) for g in group.groups if "values" in g.attributes}


def _pin(group: Group, units: _Units, templates: Mapping[str, Group]) -> Pin:
    arcs = tuple(
        Arc(
            related=related,
            kind=timing.value("timing_type", "combinational"),
            sense=timing.value("timing_sense", "non_unate"),
            when=timing.value("when") or None,
            tables=_tables(timing, templates, units, units.ns),
        )
        for timing in group.all("timing")
        for related in timing.value("related_pin").split()
    )
    power = []
    for internal in group.all("internal_power"):
        tables = _tables(internal, templates, units, units.femtojoule)
        if "power" in tables:  # one table for both edges
            edges = dict.fromkeys(_EDGES, tables["power"])
        else:
            edges = {e: tables[f"{e}_power"] for e in _EDGES if f"{e}_power" in tables}
        for related in internal.value("related_pin").split() or [None]:
            power.append(
                InternalPower(related=related, when=internal.value("when") or None, tables=edges)
            )
    load = group.number("max_capacitance", float("inf"))
    return Pin(
        name=group.arguments[0],
        direction=group.value("direction"),
        capacitance=group.number("capacitance") * units.femtofarad,
        max_load=load * units.femtofarad,
        function=group.value("function") or None,
        arcs=arcs,
        power=tuple(power),
    )


def _clock_gate(cell: Group) -> ClockGate | None:
    kind = cell.value("clock_gating_integrated_cell")
    if not kind:
        return None
    role = {
        role: pin.arguments[0]
        for pin in cell.all("pin")
        for role in ("clock", "enable", "out")
        if pin.value(f"clock_gate_{role}_pin").lower() == "true"
    }
    return ClockGate(kind=kind, clock=role["clock"], enable=role["enable"], output=role["out"])


def _cell(group: Group, units: _Units, templates: Mapping[str, Group]) -> Cell:
    flip_flop = None
    for ff in group.all("ff"):
        flip_flop = FlipFlop(
            states=(ff.arguments[0], ff.arguments[1]),
            clocked_on=ff.value("clocked_on"),
            next_state=ff.value("next_state"),
        )
    leakage = [
        (g.value("when"), g.number("value") * units.nanowatt) for g in group.all("leakage_power")
    ]
    pins = [_pin(pin, units, templates) for pin in group.all("pin")]
    return Cell(
        name=group.arguments[0],
        area=group.number("area"),
        leakage=group.number("cell_leakage_power") * units.nanowatt,
        leakage_when=tuple((when, value) for when, value in leakage if when),
        pins={pin.name: pin for pin in pins},
        flip_flop=flip_flop,
        clock_gate=_clock_gate(group),
    )

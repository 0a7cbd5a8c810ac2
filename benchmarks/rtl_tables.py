"""Energy tables of the accelerator model from gates: events of the PEs and of a row's edge.

    python benchmarks/rtl_tables.py --liberty FILE --node-nm 45 [--others] [--out FILE.json]

Measures the int8 PE, the group PE and the edge on synthetic operands of several budgets and shares
of zeros (`benchmarks/rtl_energy.py` says how), and solves for the energy of each event that the
model counts (`stp_jax.hwmodel.gates`), by least squares of relative errors. Then it measures what
was held back, other budgets, shares of zeros, widths of the distributions and seeds, and prints
how far the model is off. ``--others`` does so for dot products and the rivals' PEs instead of
the int8 PE, the group PE and the edge. The file is one that `stp_jax.hwmodel.read_technology`
reads; memory's energies are those of the model's table, scaled where the node is another.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rtl.bench import common_period, implement_design, target
from benchmarks.rtl.catalogue import DESIGNS
from benchmarks.rtl.design import Design, Operands
from benchmarks.rtl.edge import EDGE, lanes_of, weight_edge
from benchmarks.rtl.energy import measure
from benchmarks.rtl.gate_simulation import simulate
from benchmarks.rtl.operands import (
    WEIGHT_DEVIATION,
    OperandSet,
    best_deviation,
    of_network,
    synthetic,
)
from benchmarks.rtl.rivals import precision_of
from benchmarks.rtl.stimuli import passes
from benchmarks.rtl.synthesis import Implementation, Target
from stp_jax import hwmodel
from stp_jax.hwmodel import gates
from stp_jax.hwmodel.arrays import fold
from stp_jax.hwmodel.pes import Workload
from stp_jax.terms import count as terms_of

DIGITS = 4
MEMORY = ("sram_8kib_64b", "sram_32kib_64b", "sram_1mib_64b", "dram_64b")
MEMORY_NODE, MEMORY_VOLT = 45.0, 0.9
# The model's PE for each of the other designs.
OTHERS: dict[str, hwmodel.PE] = {
    "mac_dot_1x1": hwmodel.DotProduct(lanes=1),
    "mac_dot_8x1": hwmodel.DotProduct(lanes=8),
    **{
        f"mac_dot_8x1_w{bits}": hwmodel.DotProduct(lanes=8, weight_bits=bits)
        for bits in gates.NARROW_WEIGHTS
    },
    "stripes": hwmodel.Stripes(lanes=8, serial="weights"),
    "pragmatic": hwmodel.BitPragmatic(lanes=8, serial="weights"),
    "bitwave": hwmodel.BitWave(lanes=8),
    "bitvert": hwmodel.BitVert(lanes=8),
    "term_mac": hwmodel.TermMac(group_size=8),
}
OTHER_ENTRIES = {  # others are named alike
    name: gates.dot_name(pe.lanes, pe.weight_bits)
    for name, pe in OTHERS.items()
    if isinstance(pe, hwmodel.DotProduct)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of one measurement.

    Attributes:
      budget: slots a group.
      terms: that the weights are projected to; as many as slots where None.
      zeros, activation, weight, weight_bits, seed: of the synthetic operands.
      folds, filters: their size.
      rows: of the array, which a fold's loading has to pass or to serve.
    """

    budget: int
    terms: int | None = None
    zeros: float = 0.4
    activation: float = 40.0
    weight: float = WEIGHT_DEVIATION
    weight_bits: int = 8
    seed: int = 0
    folds: int = 32
    filters: int = 16
    rows: int = 8

    def work(self, design: Design, operands: OperandSet) -> Operands:
        """What the design does of these operands."""
        terms = self.terms or self.budget
        work = operands.at(terms, takes_terms=design.takes_terms)
        return dataclasses.replace(work, rows=self.rows)

    def narrowed(self, bits: int) -> Case:
        """The case for weights of so many bits, as wide as before beside their best deviation."""
        if bits == self.weight_bits:
            return self
        weight = self.weight / WEIGHT_DEVIATION * best_deviation(bits)
        return dataclasses.replace(self, weight=weight, weight_bits=bits)

    def operands(self) -> OperandSet:
        return synthetic(
            (self.terms or self.budget,),
            folds=self.folds,
            filters=self.filters,
            seed=self.seed,
            zeros=self.zeros,
            activation_deviation=self.activation,
            weight_deviation=self.weight,
            weight_bits=self.weight_bits,
        )


_LOADS = Case(budget=8, folds=64, filters=4, seed=1)
CALIBRATION = (
    *(Case(budget=k, zeros=zeros) for zeros in (0.0, 0.4, 0.7) for k in (1, 2, 4, 8)),
    *(Case(budget=k, terms=n) for k, n in ((4, 3), (5, 3), (6, 4), (8, 6))),
    _LOADS,
)
# For PEs of several lanes: passes that hold little or nothing, and more than two of them.
LANE_CALIBRATION = (
    *CALIBRATION,
    *(Case(budget=k, terms=n, seed=7) for k, n in ((5, 1), (6, 2))),
    Case(budget=12, seed=5),
    dataclasses.replace(_LOADS, rows=32),
)
HELD_BACK = (
    *(Case(budget=k, zeros=zeros, seed=2) for zeros in (0.2, 0.5) for k in (3, 6)),
    *(Case(budget=k, folds=8, filters=64, seed=3) for k in (8, 6, 4, 3)),
    Case(budget=4, activation=20.0, seed=4),
    Case(budget=4, weight=20.0, seed=4),
    *(Case(budget=k, terms=n, seed=3) for k, n in ((5, 4), (6, 3), (8, 5))),
)


_OTHER = Case(budget=8, folds=16)
OTHER_CALIBRATION = (
    *(dataclasses.replace(_OTHER, zeros=zeros) for zeros in (0.0, 0.4, 0.7)),
    dataclasses.replace(_OTHER, activation=20.0, seed=7),
    *(dataclasses.replace(_OTHER, weight=weight, seed=8) for weight in (10.0, 20.0, 60.0)),
    *(Case(budget=8, folds=48, filters=3, seed=1, rows=rows) for rows in (8, 32)),
)
# Unlike the cases by which the events were chosen.
OTHER_HELD_BACK = (
    *(dataclasses.replace(_OTHER, zeros=zeros, seed=21) for zeros in (0.1, 0.5, 0.6)),
    *(Case(budget=8, folds=6, filters=64, seed=22, rows=rows) for rows in (8, 32)),
    *(dataclasses.replace(_OTHER, activation=width, seed=23) for width in (15.0, 60.0)),
    *(dataclasses.replace(_OTHER, weight=width, seed=24) for width in (14.0, 28.0)),
    dataclasses.replace(_OTHER, zeros=0.6, activation=12.0, weight=16.0, seed=25),
    dataclasses.replace(_OTHER, zeros=0.2, activation=50.0, weight=24.0, seed=26),
)
# A group takes three times as many cycles in a tMAC.
TERM_MAC_CALIBRATION = (
    *(dataclasses.replace(c, folds=c.folds // 2) for c in CALIBRATION if c is not _LOADS),
    *(Case(budget=1, folds=48, filters=2, seed=1, rows=rows) for rows in (8, 32)),
)
TERM_MAC_HELD_BACK = tuple(
    dataclasses.replace(case, folds=case.folds // 2, seed=case.seed + 30) for case in HELD_BACK
)


def energy_pj(
    design: Design,
    made: Implementation,
    operands: OperandSet,
    case: Case,
    *,
    aim: Target,
    period: float,
) -> float:
    """The design's energy on a case."""
    stimulus = design.drive(case.work(design, operands), case.budget)
    activity = simulate(made.netlist, made.timing, stimulus, period=period, seed=case.seed)
    return measure(made.netlist, made.timing, activity, aim.library.voltage).total / 1000


def pe_events(design: Design, operands: OperandSet, case: Case) -> dict[str, float]:
    """What the model counts for one PE: a column of them, all with the same activations."""
    terms, rows = case.terms or case.budget, case.rows
    work = case.work(design, operands)
    folds, filters, group = work.weights.shape
    length, pixels = (group, folds) if design.takes_terms else (1, folds * group)
    network = hwmodel.Network((hwmodel.dense("pe", rows * length, filters, rows=pixels),))
    pe: hwmodel.PE = hwmodel.BitParallel()
    if design.takes_terms:
        pe = hwmodel.GroupPE(group_size=group, lanes=lanes_of(design), bits=design.weight_bits)
    folding = fold(network, hwmodel.Array(rows=rows, cols=1, pe=pe))
    activations = {"pe": np.tile(work.activations.reshape(pixels, length), (1, rows))}
    if lanes_of(design) > 1:
        # Of the PE's own weights, which differ from fold to fold; a layer's are the same.
        lanes, count = lanes_of(design), passes(case.budget, lanes_of(design))
        slots = count * -(-case.budget // count)
        filled = float(held_terms(work).sum()) * rows / folds
        each = rows * float(filters)
        counted = gates.lane_events(
            folding,
            gates.lane_name(lanes, design.weight_bits),
            np.array([each * count]),
            np.array([each * slots]),
            np.array([filled]),
            gates.stored_bits(network, activations),
        )
        return {name: float(np.ravel(x)[0]) / rows for name, x in counted.items()}
    counted = pe.activity(
        Workload(
            network=network,
            folding=folding,
            budgets=terms if design.takes_terms else None,
            activations=activations,
        )
    ).gates
    if counted is None:
        raise ValueError(f"the model has no events by gates of {design.name}")
    events = {name: float(np.ravel(count)[0]) / rows for name, count in counted.items()}
    if case.budget > terms and "group_first_empty_slot" in events:  # counted for full slots above
        events["group_first_empty_slot"] += folds * filters
        events["group_further_empty_slot"] += folds * filters * (case.budget - terms - 1)
    return events


def other_events(design: Design, operands: OperandSet, case: Case) -> dict[str, float]:
    """As `pe_events`, of other designs: folds are layers, whose rows hold the same weights."""
    pe = OTHERS[design.name]
    work = case.work(design, operands)
    folds, filters, group = work.weights.shape
    # With one lane, a group's weights are in as many rows.
    copies = case.rows // group if pe == hwmodel.DotProduct(lanes=1) else case.rows
    names = [f"fold{number}" for number in range(folds)]
    layers = tuple(hwmodel.dense(name, copies * group, filters) for name in names)
    network = hwmodel.Network(layers)
    if isinstance(pe, hwmodel.Stripes):
        pe = dataclasses.replace(pe, precisions=dict.fromkeys(names, precision_of(work.weights)))
    weights = np.tile(work.weights.transpose(0, 2, 1), (1, copies, 1))
    activations = np.tile(work.activations[:, None], (1, 1, copies))
    counted = pe.activity(
        Workload(
            network=network,
            folding=fold(network, hwmodel.Array(rows=case.rows, cols=1, pe=pe)),
            budgets=case.budget if design.takes_terms else None,
            weights=dict(zip(names, weights, strict=True)),
            activations=dict(zip(names, activations, strict=True)),
            basis="gates",
        )
    ).gates
    if counted is None:
        raise ValueError(f"the model has no events by gates of {design.name}")
    return {name: float(np.sum(count)) / copies for name, count in counted.items()}


def held_terms(work: Operands) -> np.ndarray:
    """Terms of every group, integers [folds * filters]."""
    return np.asarray(terms_of(work.weights)).sum(axis=-1).ravel()


def edge_events(design: Design, operands: OperandSet, case: Case) -> dict[str, float]:
    """What the model counts for one row's edge."""
    work = operands.by_budget[case.terms or case.budget]
    groups = work.psums.size
    lanes, budget = lanes_of(design), np.array([float(case.budget)])
    if lanes == 1:
        each = gates.edge_events(budget, 0.0)
    else:
        held = held_terms(work)
        each = gates.lane_edge_events(
            lanes,
            design.weight_bits,
            budget,
            np.ceil(budget / lanes),
            lambda caps: np.array([np.minimum(held, caps[0]).mean()]),
            lambda values: values,
        )
    return {name: float(count[0]) * groups for name, count in each.items()}


def solve(events: Sequence[dict[str, float]], energies: Sequence[float]) -> dict[str, float]:
    """Non-negative energy of each event in pJ, by least squares of relative errors.

    Raises:
      ValueError: an event costs nothing, so the cases do not tell it from the others.
    """
    names = list(events[0])
    counts = np.array([[case[name] for name in names] for case in events])
    relative = counts / np.asarray(energies)[:, None]
    scale = relative.max(axis=0)
    found = nnls(relative / scale, np.ones(len(events)))[0] / scale
    lost = [name for name, value in zip(names, found, strict=True) if value <= 0]
    if lost:
        raise ValueError(f"no energy found for {', '.join(lost)}")
    return dict(zip(names, map(float, found), strict=True))


def calibration(design: Design) -> list[Case]:
    """Cases to solve on."""
    if design.name in OTHERS:
        chosen = TERM_MAC_CALIBRATION if design.takes_terms else OTHER_CALIBRATION
        return [case.narrowed(design.weight_bits) for case in chosen]
    cases = LANE_CALIBRATION if lanes_of(design) > 1 else CALIBRATION
    return [case.narrowed(design.weight_bits) for case in cases if calibrates(design, case)]


def calibrates(design: Design, case: Case) -> bool:
    """Budgets change nothing in an int8 PE, empty slots little in the edge of one term a cycle.

    Rows change nothing for an edge.
    """
    if not design.takes_terms:
        return case.budget == 8 and case.terms is None
    if design.top != EDGE:
        return True
    return case.zeros == 0.4 and case.rows == 8 and (case.terms is None or lanes_of(design) > 1)


def predict(table: dict[str, float], events: dict[str, float]) -> float:
    return sum(table[name] * count for name, count in events.items())


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liberty", type=Path, required=True, help="standard cells")
    parser.add_argument("--node-nm", type=float, required=True, help="the library's node")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--clock-ns", type=float, default=2.0, help="shortest clock period to use")
    parser.add_argument("--wire", type=float, default=1.0, help="fF of wire per pin of a net")
    parser.add_argument("--baseline", default="mac", choices=DESIGNS)
    parser.add_argument("--group-pe", nargs="+", default=["gpe"], choices=DESIGNS)
    parser.add_argument("--others", action="store_true", help=f"measure {', '.join(OTHERS)}")
    parser.add_argument("--packed", type=Path, help="hold back a packed network's layers as well")
    parser.add_argument("--activations", type=Path, help="its recorded activations, as .npz")
    arguments = parser.parse_args()
    if not arguments.liberty.is_file():
        parser.error(f"--liberty: no file {arguments.liberty}")
    if (arguments.packed is None) != (arguments.activations is None):
        parser.error("--packed and --activations go together")
    return arguments


def main() -> None:
    arguments = read_arguments()
    aim = target(arguments.liberty, period=arguments.clock_ns, wire=arguments.wire)
    if arguments.others:
        designs = [(DESIGNS[name], other_events) for name in OTHERS]
    else:
        group_pes = [DESIGNS[name] for name in arguments.group_pe]
        designs = [(design, pe_events) for design in (DESIGNS[arguments.baseline], *group_pes)]
        edges = (weight_edge(lanes_of(design), design.weight_bits) for design in group_pes)
        designs += [(edge, edge_events) for edge in edges]
    made = {design.name: implement_design(design, aim) for design, _ in designs}
    period = common_period((m.timing.period for m in made.values()), arguments.clock_ns)
    table: dict[str, float] = {}
    for design, count in designs:
        counts, energies = [], []
        for case in calibration(design):
            operands = case.operands()
            counts.append(count(design, operands, case))
            energies.append(
                energy_pj(design, made[design.name], operands, case, aim=aim, period=period)
            )
        table |= solve(counts, energies)
        used = {name: table[name] for name in counts[0]}
        fitted = [predict(used, c) / e - 1 for c, e in zip(counts, energies, strict=True)]
        print(f"{design.name}: {', '.join(f'{n} {v:.4g} pJ' for n, v in used.items())}")
        print(
            f"  calibration: within {max(map(abs, fitted)):.1%} on {len(fitted)} cases", flush=True
        )
        for case, operands in held_back(arguments, design):
            measured = energy_pj(design, made[design.name], operands, case, aim=aim, period=period)
            error = predict(used, count(design, operands, case)) / measured - 1
            print(f"  held back {error:+.1%}: {case}, {measured:.0f} pJ", flush=True)
    if arguments.out:
        content = describe(arguments, aim, period, table, made)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def held_back(arguments: argparse.Namespace, design: Design) -> list[tuple[Case, OperandSet]]:
    chosen = list(HELD_BACK)
    if not design.takes_terms:  # the budget changes nothing
        plain = [dataclasses.replace(case, budget=8) for case in HELD_BACK if case.terms is None]
        chosen = list(dict.fromkeys(plain))
    if design.top == EDGE:  # it sees no activations
        chosen = [case for case in HELD_BACK if case.zeros == 0.4 and case.activation == 40.0]
    if design.name in OTHERS:
        chosen = list(TERM_MAC_HELD_BACK if design.takes_terms else OTHER_HELD_BACK)
    elif lanes_of(design) > 1:  # whose events were chosen with an eye on the errors of HELD_BACK
        chosen = [dataclasses.replace(case, seed=case.seed + 10) for case in chosen]
        chosen += [Case(budget=k, zeros=0.3, seed=15) for k in (2, 5, 7)]
    chosen = [case.narrowed(design.weight_bits) for case in chosen]
    cases = [(case, case.operands()) for case in chosen]
    if arguments.packed is not None and design.weight_bits == 8:  # as wide as the network's
        for budget in (8, 4, 3) if design.takes_terms else (8,):
            case = Case(budget=budget, folds=32, filters=16, seed=6)
            files = (arguments.packed, arguments.activations)
            network = of_network(
                *files, (budget,), folds=case.folds, filters=case.filters, seed=case.seed
            )
            cases.append((case, network))
    return cases


def describe(
    arguments: argparse.Namespace,
    aim: Target,
    period: float,
    table: dict[str, float],
    made: dict[str, Implementation],
) -> dict:
    """The table as a file of `read_technology`."""
    library = aim.library
    chosen = (
        "--others"
        if arguments.others
        else f"--baseline {arguments.baseline} --group-pe {' '.join(arguments.group_pe)}"
    )
    source = (
        f"benchmarks/rtl_tables.py {chosen} --liberty {arguments.liberty.name} --node-nm "
        f"{arguments.node_nm:g} --wire {arguments.wire:g}: {library.name}, {library.voltage:g} V, "
        f"clock {period:.2f} ns"
    )
    areas = {name: made[design].netlist.area for name, design in area_entries(arguments).items()}

    def entries(values: dict[str, float]) -> dict[str, dict]:
        return {
            name: {"value": float(f"{value:.{DIGITS}g}"), "source": source}
            for name, value in values.items()
        }

    return {
        "name": f"{arguments.node_nm:g} nm by gates",
        "node_nm": arguments.node_nm,
        "basis": "gates",
        "energy_pj": {**entries(table), **memory(arguments.node_nm, library.voltage)},
        "area_um2": entries(areas),
    }


def area_entries(arguments: argparse.Namespace) -> dict[str, str]:
    """Designs by the names that the table has for their areas."""
    if arguments.others:
        return {f"{OTHER_ENTRIES.get(name, name)}_pe": name for name in OTHERS}
    entries = {"bit_parallel_pe": arguments.baseline}
    for design in map(DESIGNS.get, arguments.group_pe):
        lanes = lanes_of(design)
        pe, edge = gates.group_area_names(lanes, design.weight_bits)
        entries[pe] = design.name
        entries[edge] = weight_edge(lanes, design.weight_bits).name
    return entries


def memory(node_nm: float, voltage: float) -> dict[str, dict]:
    """Memory entries of the model's table; SRAM scaled by node and supply squared elsewhere."""
    default = hwmodel.HOROWITZ_45NM
    sources = dict(default.sources)
    entries = {}
    for name in MEMORY:
        value, source = default.energy_pj[name], sources[f"energy_pj.{name}"]
        if node_nm != MEMORY_NODE and name != "dram_64b":
            value *= node_nm / MEMORY_NODE * (voltage / MEMORY_VOLT) ** 2
            source = f"derived: {source}, times node and supply squared"
        entries[name] = {"value": float(f"{value:.{DIGITS}g}"), "source": source}
    return entries


if __name__ == "__main__":
    main()

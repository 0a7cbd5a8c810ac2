"""Energy tables of the accelerator model from gates: events of the PEs and of a row's edge.

    python benchmarks/rtl_tables.py --liberty FILE --node-nm 45 [--out FILE.json]

Measures the int8 PE, the group PE and the edge on synthetic operands of several budgets and shares
of zeros (`benchmarks/rtl_energy.py` says how), and solves for the energy of each event that the
model counts (`stp_jax.hwmodel.gates`), by least squares of relative errors. Then it measures what
was held back, other budgets, shares of zeros, widths of the distributions and seeds, and prints
how far the model is off. The file is one that `stp_jax.hwmodel.read_technology` reads; memory's
energies are those of the model's table, scaled where the node is another.
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
from benchmarks.rtl.operands import OperandSet, of_network, synthetic
from benchmarks.rtl.stimuli import ROWS, passes
from benchmarks.rtl.synthesis import Implementation, Target
from stp_jax import hwmodel
from stp_jax.hwmodel import gates
from stp_jax.hwmodel.arrays import fold
from stp_jax.hwmodel.pes import Workload
from stp_jax.terms import count as terms_of

DIGITS = 4
MEMORY = ("sram_8kib_64b", "sram_32kib_64b", "sram_1mib_64b", "dram_64b")
MEMORY_NODE, MEMORY_VOLT = 45.0, 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of one measurement.

    Attributes:
      budget: slots a group.
      terms: that the weights are projected to; as many as slots where None.
      zeros, activation, weight, seed: of the synthetic operands.
      folds, filters: their size.
    """

    budget: int
    terms: int | None = None
    zeros: float = 0.4
    activation: float = 40.0
    weight: float = 36.0
    seed: int = 0
    folds: int = 32
    filters: int = 16

    def operands(self) -> OperandSet:
        return synthetic(
            (self.terms or self.budget,),
            folds=self.folds,
            filters=self.filters,
            seed=self.seed,
            zeros=self.zeros,
            activation_deviation=self.activation,
            weight_deviation=self.weight,
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
)
HELD_BACK = (
    *(Case(budget=k, zeros=zeros, seed=2) for zeros in (0.2, 0.5) for k in (3, 6)),
    *(Case(budget=k, folds=8, filters=64, seed=3) for k in (8, 6, 4, 3)),
    Case(budget=4, activation=20.0, seed=4),
    Case(budget=4, weight=20.0, seed=4),
    *(Case(budget=k, terms=n, seed=3) for k, n in ((5, 4), (6, 3), (8, 5))),
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
    terms = case.terms or case.budget
    stimulus = design.drive(operands.at(terms, takes_terms=design.takes_terms), case.budget)
    activity = simulate(made.netlist, made.timing, stimulus, period=period, seed=case.seed)
    return measure(made.netlist, made.timing, activity, aim.library.voltage).total / 1000


def pe_events(design: Design, operands: OperandSet, case: Case) -> dict[str, float]:
    """What the model counts for one PE: a column of ROWS of them, all with the same activations."""
    terms = case.terms or case.budget
    work = operands.at(terms, takes_terms=design.takes_terms)
    folds, filters, group = work.weights.shape
    length, pixels = (group, folds) if design.takes_terms else (1, folds * group)
    network = hwmodel.Network((hwmodel.dense("pe", ROWS * length, filters, rows=pixels),))
    pe: hwmodel.PE = hwmodel.BitParallel()
    if design.takes_terms:
        pe = hwmodel.GroupPE(group_size=group, lanes=lanes_of(design))
    folding = fold(network, hwmodel.Array(rows=ROWS, cols=1, pe=pe))
    activations = {"pe": np.tile(work.activations.reshape(pixels, length), (1, ROWS))}
    if lanes_of(design) > 1:
        # Of the PE's own weights, which differ from fold to fold; a layer's are the same.
        lanes, count = lanes_of(design), passes(case.budget, lanes_of(design))
        slots = count * -(-case.budget // count)
        filled = float(held_terms(work).sum()) * ROWS / folds
        each = ROWS * float(filters)
        counted = gates.lane_events(
            folding,
            lanes,
            np.array([each * count]),
            np.array([each * slots]),
            np.array([filled]),
            gates.stored_bits(network, activations),
        )
        return {name: float(np.ravel(x)[0]) / ROWS for name, x in counted.items()}
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
    events = {name: float(np.ravel(count)[0]) / ROWS for name, count in counted.items()}
    if case.budget > terms and "group_first_empty_slot" in events:  # counted for full slots above
        events["group_first_empty_slot"] += folds * filters
        events["group_further_empty_slot"] += folds * filters * (case.budget - terms - 1)
    return events


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


def calibrates(design: Design, case: Case) -> bool:
    """Budgets change nothing in an int8 PE, empty slots little in the edge of one term a cycle."""
    if not design.takes_terms:
        return case.budget == 8 and case.terms is None
    if design.top != EDGE:
        return True
    return case.zeros == 0.4 and (case.terms is None or lanes_of(design) > 1)


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
    group_pes = [DESIGNS[name] for name in arguments.group_pe]
    designs = [(design, pe_events) for design in (DESIGNS[arguments.baseline], *group_pes)]
    designs += [(weight_edge(lanes_of(design)), edge_events) for design in group_pes]
    made = {design.name: implement_design(design, aim) for design, _ in designs}
    period = common_period((m.timing.period for m in made.values()), arguments.clock_ns)
    table: dict[str, float] = {}
    for design, count in designs:
        counts, energies = [], []
        for case in LANE_CALIBRATION if lanes_of(design) > 1 else CALIBRATION:
            if calibrates(design, case):
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
    if lanes_of(design) > 1:  # whose events were chosen with an eye on the errors of HELD_BACK
        chosen = [dataclasses.replace(case, seed=case.seed + 10) for case in chosen]
        chosen += [Case(budget=k, zeros=0.3, seed=15) for k in (2, 5, 7)]
    cases = [(case, case.operands()) for case in chosen]
    if arguments.packed is not None:
        for budget in (8, 4, 3):
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
    source = (
        f"benchmarks/rtl_tables.py --baseline {arguments.baseline} --group-pe "
        f"{' '.join(arguments.group_pe)} --liberty {arguments.liberty.name} --node-nm "
        f"{arguments.node_nm:g} --wire {arguments.wire:g}: {library.name}, {library.voltage:g} V, "
        f"clock {period:.2f} ns"
    )
    areas = {
        "bit_parallel_pe": made[arguments.baseline].netlist.area,
    }
    for design in map(DESIGNS.get, arguments.group_pe):
        lanes = lanes_of(design)
        of_lanes = f"_of_{lanes}_lanes" if lanes > 1 else ""
        areas[f"group_pe_8{of_lanes}"] = made[design.name].netlist.area
        areas[f"row_edge_8{of_lanes}"] = made[weight_edge(lanes).name].netlist.area

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

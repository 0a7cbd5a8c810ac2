"""Energy of PEs on an FPGA: placed and routed by VTR, priced by its power model.

    python benchmarks/rtl_fpga_energy.py --vtr DIR [--designs mac_plain_8 gpe_lanes_4] [--out FILE]

DIR is a checkout of VTR 8.0 with ``build/vpr/vpr`` built (``make vpr``). `benchmarks/rtl/fpga.py`
says what is modelled. Every design computes exactly with its routed delays, or the run stops. Nets
that only leave the PE are the next one's, as by gates; pads stand for the neighbours.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rtl import fpga
from benchmarks.rtl.catalogue import DESIGNS
from benchmarks.rtl.design import VERILOG, Design
from benchmarks.rtl.operands import synthetic
from benchmarks.rtl.stimuli import drive_mac_dot
from benchmarks.rtl.synthesis import yosys_version

BUDGETS = (8, 4, 2)
SIZE = {"folds": 8, "filters": 64}


def plain_dot(lanes: int) -> Design:
    """The int8 dot product as an FPGA user writes it, on hard multipliers."""
    return Design(
        name=f"mac_plain_{lanes}",
        title=f"int8 dot product of {lanes}, hard multipliers",
        top="plain_dot",
        sources=(VERILOG / "plain_dot.v",),
        parameters={"LANES": lanes},
        group=8,
        driver=functools.partial(drive_mac_dot, lanes=lanes),
        rate=lambda budget: float(lanes),
        takes_terms=False,
    )


CHOICE = {design.name: design for design in map(plain_dot, (1, 8))}
CHOICE |= {name: DESIGNS[name] for name in ("mac_dot_8x1", "gpe", "gpe_lanes_2", "gpe_lanes_4")}


def measured(design: Design, vtr: Path, seeds: list[int]) -> dict:
    """Primitives, critical path and pJ for each multiply-accumulate by budget, mean over seeds."""
    with tempfile.TemporaryDirectory() as name:
        routed = fpga.place_and_route(design, vtr, Path(name))
        by_budget = {}
        for budget in BUDGETS if design.takes_terms else BUDGETS[:1]:
            runs = []
            for seed in seeds:
                operands = synthetic(BUDGETS, seed=seed, **SIZE)
                work = operands.at(budget, takes_terms=design.takes_terms)
                runs.append(fpga.energy(design, routed, design.drive(work, budget), vtr))
            by_budget[budget] = {part: float(np.mean([r[part] for r in runs])) for part in runs[0]}
    return {
        "title": design.title,
        "cells": dict(routed.cells),
        "critical_path_ns": routed.period_ns,
        "pj_per_mac": by_budget,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vtr", type=Path, required=True, help="checkout with build/vpr/vpr")
    parser.add_argument("--designs", nargs="+", choices=CHOICE, default=list(CHOICE))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the operands")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    vtr = arguments.vtr.resolve()
    for needed in ("build/vpr/vpr", fpga.ARCHITECTURE, fpga.TECHNOLOGY):
        if not (vtr / needed).is_file():
            parser.error(f"--vtr: no file {vtr / needed}")
    print(f"{yosys_version()}; dynamic energy, pJ for each multiply-accumulate")
    budgets = "".join(f"{f'k={k}':>8}" for k in BUDGETS)
    print(f"{'':38}{'LUTs':>6}{'FFs':>5}{'mult.':>6}{'ns':>7}{budgets}   routing")
    results = {}
    for name in arguments.designs:
        results[name] = found = measured(CHOICE[name], vtr, arguments.seeds)
        cells, energies = found["cells"], found["pj_per_mac"]
        totals = [f"{energies[k]['total']:8.2f}" if k in energies else " " * 8 for k in BUDGETS]
        routing = np.mean([e["routing"] / e["total"] for e in energies.values()])
        print(
            f"{name:38}{cells['LUTs']:6}{cells['flip-flops']:5}{cells['multipliers']:6}"
            f"{found['critical_path_ns']:7.2f}{''.join(totals)}{routing:10.0%}",
            flush=True,
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

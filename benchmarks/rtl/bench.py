"""The measuring bench: from a design's Verilog to its energy per multiply-accumulate by gates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.rtl import opensta
from benchmarks.rtl.design import Design
from benchmarks.rtl.edge import EDGE
from benchmarks.rtl.energy import (
    EDGE_BLOCKS,
    KINDS,
    MULTIPLIER_BLOCKS,
    TERM_BLOCKS,
    Blocks,
    Energy,
    half_cv2_of,
    measure,
)
from benchmarks.rtl.gate_simulation import simulate
from benchmarks.rtl.liberty import Library, read_library
from benchmarks.rtl.operands import OperandSet
from benchmarks.rtl.play import play_design
from benchmarks.rtl.synthesis import Implementation, Target, implement
from benchmarks.rtl.timing import Conditions

CLOCK_SLEW_NS = 0.04
OUTPUT_PINS = 1.5  # fF of the pin that an output drives in the next PE, beside a wire


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """Energy of one design on one set of operands at one budget.

    Attributes:
      by_block: pJ per multiply-accumulate of the dense layer, by block and kind.
      area: of the cells, in the library's unit.
      toggles_per_cycle: changes of all nets per cycle.
    """

    by_block: Mapping[str, Mapping[str, float]]
    toggles_per_cycle: float

    @property
    def pj_per_mac(self) -> float:
        """All blocks and kinds."""
        return sum(sum(kinds.values()) for kinds in self.by_block.values())


def target(liberty: Path, *, period: float, wire: float) -> Target:
    """A synthesis target with this bench's conditions; wire in fF per pin, period in ns."""
    return Target(
        liberty=liberty,
        library=read_library(liberty),
        period=period,
        conditions=Conditions(wire=wire, clock_slew=CLOCK_SLEW_NS, output_load=OUTPUT_PINS + wire),
    )


def implement_design(design: Design, aim: Target) -> Implementation:
    """Synthesises a design."""
    return implement(design.top, design.sources, design.parameters, aim)


def measure_design(
    design: Design,
    made: Implementation,
    operands: Sequence[OperandSet],
    budget: int,
    *,
    library: Library,
    period: float,
) -> Measurement:
    """Energy of a design at a budget, mean over sets of operands.

    Raises:
      RuntimeError: the Verilog or its gates gave a value that is not the expected one.
    """
    results = []
    for number, operand_set in enumerate(operands):
        stimulus = design.drive(operand_set.at(budget, takes_terms=design.takes_terms), budget)
        play_design(design, stimulus)
        activity = simulate(made.netlist, made.timing, stimulus, period=period, seed=number)
        blocks = blocks_of(design)
        energy = measure(made.netlist, made.timing, activity, library.voltage, blocks)
        cycles = stimulus.measured[1] - stimulus.measured[0]
        changes = sum(activity.toggles(net) for net in made.netlist.nets)
        results.append((_per_mac(energy, stimulus.multiplications), changes / cycles))
    return Measurement(
        by_block=_mean([blocks for blocks, _ in results]),
        toggles_per_cycle=math.fsum(changes for _, changes in results) / len(results),
    )


def blocks_of(design: Design) -> Blocks:
    """How the design's cells are divided in breakdowns."""
    if design.top == EDGE:
        return EDGE_BLOCKS
    return TERM_BLOCKS if design.takes_terms else MULTIPLIER_BLOCKS


def check_design(
    design: Design,
    made: Implementation,
    operands: OperandSet,
    budget: int,
    *,
    aim: Target,
    period: float,
) -> dict:
    """Power of the cells and shortest period by OpenSTA, and the bench's power over it."""
    opensta.check_version()
    netlist, timing = made.netlist, made.timing
    stimulus = design.drive(operands.at(budget, takes_terms=design.takes_terms), budget)
    activity = simulate(netlist, timing, stimulus, period=period)
    energy = measure(netlist, timing, activity, aim.library.voltage)
    window = (activity.stop - activity.start) * 1e-12
    undriven = half_cv2_of(netlist.input_nets, timing, activity, aim.library.voltage)
    ours = {kind: energy.of(kind) * 1e-15 / window for kind in KINDS}
    ours["switching"] -= undriven * 1e-15 / window
    theirs = opensta.power(netlist, timing, activity, aim, period=period)
    by_kind = {kind: getattr(theirs, kind) for kind in KINDS}
    ratios = {kind: ours[kind] / by_kind[kind] for kind in KINDS}
    return {
        "watts": by_kind,
        "bench_over_opensta": ratios | {"total": sum(ours.values()) / theirs.total},
        "period_ns": opensta.shortest_period(netlist, timing, aim, period=period),
    }


def _per_mac(energy: Energy, multiplications: int) -> dict[str, dict[str, float]]:
    return {
        block: {kind: float(fj) / multiplications / 1000 for kind, fj in kinds.items()}
        for block, kinds in energy.by_block.items()
    }


def _mean(results: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        block: {kind: math.fsum(r[block][kind] for r in results) / len(results) for kind in kinds}
        for block, kinds in results[0].items()
    }


def common_period(periods: Iterable[float], at_least: float) -> float:
    """A period of the clock that all meet, in steps of 0.05 ns, from ``at_least`` on."""
    return max(at_least, math.ceil(max(periods) * 20 - 1e-9) / 20)

"""Comparison of arrays on one network, and sensitivity to the energy table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd

from stp_jax.hwmodel import gates
from stp_jax.hwmodel.arrays import Array, fold
from stp_jax.hwmodel.encoders import array_area_um2
from stp_jax.hwmodel.evaluate import evaluate
from stp_jax.hwmodel.group_pe import GroupPE
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import Budgets, Operands, Real
from stp_jax.hwmodel.pes import PE, BitParallel, DotProduct
from stp_jax.hwmodel.report import Report, computational_saving
from stp_jax.hwmodel.technology import (
    HOROWITZ_45NM,
    NANGATE_45NM_GATES,
    MissingEntryError,
    Technology,
)
from stp_jax.hwmodel.term_histogram import GroupTerms

Match = Literal["area", "throughput"]
_GATES_COLUMNS = (
    "pj_per_mac",
    "encoder_pj_per_mac",
    "class_lanes",
    "saving",
    "saving_with_encoder",
    "saving_over_dot_8",
    "um2_per_mac",
    "reason",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """An array and the operands that it runs: pruned ones for group PEs, int8 ones for others."""

    array: Array
    budgets: Budgets = None
    weights: Operands | GroupTerms | None = None
    activations: Operands | None = None


def peak_macs(design: Design, network: Network) -> float:
    """Multiply-accumulates a cycle with every PE busy.

    At the nominal rate of the PE: eight bits for the digit-serial ones, and for group PEs the
    cycles of groups at the design's budgets, averaged over the network's multiply-accumulates.
    """
    array, report = design.array, None
    if isinstance(array.pe, GroupPE):
        report = evaluate(network, array, budgets=design.budgets, weights=design.weights)
    return _peak_macs(array, report)


def _peak_macs(array: Array, report: Report | None) -> float:
    """As `peak_macs`, from a report on the array, which only group PEs need."""
    places = float(array.count * array.rows * array.cols)
    if not isinstance(array.pe, GroupPE) or report is None:
        return places * float(array.pe.nominal_macs())
    folding = fold(report.network, array)
    streaming = report.compute_cycles / folding.parallel_share - folding.fill_cycles
    of_group = np.asarray(streaming / (folding.folds * folding.steps))
    cycles = np.average(of_group, weights=np.asarray(report.operations["macs"]))
    return places * float(array.pe.group_size) / float(cycles)


def match(
    design: Design,
    reference: Design,
    network: Network,
    *,
    by: Match,
    technology: Technology = HOROWITZ_45NM,
) -> Design:
    """The design with as many columns as fit the reference's area, or reach its peak throughput.

    Rows stay, so the reduction folds alike. Area is that of PEs and edge encoders; throughput that
    of `peak_macs`, rounded to whole columns, at least one.

    Raises:
      ValueError: ``by`` is neither; not even one column fits the area; or the technology lacks an
        area.
    """
    if by == "area":
        # The encoders are at the rows' or the columns' edge, so area is a line in the columns.
        one, two = (_area_um2(_with_columns(design.array, n), technology) for n in (1, 2))
        room = _area_um2(reference.array, technology)
        if one > room:
            raise ValueError(
                f"a single column of {design.array.rows} {type(design.array.pe).__name__} takes "
                f"{one:.0f} µm², more than the reference's {room:.0f} µm²"
            )
        # The areas are sums of rounded numbers; what fits exactly must fit.
        cols = 1 + math.floor((room - one) / (two - one) * (1 + 1e-12))
    elif by == "throughput":
        peaks = peak_macs(design, network), peak_macs(reference, network)
        cols = max(round(float(peaks[1] / (peaks[0] / design.array.cols))), 1)
    else:
        raise ValueError(f"match by 'area' or 'throughput', not {by!r}")
    return dataclasses.replace(design, array=_with_columns(design.array, cols))


def _with_columns(array: Array, cols: int) -> Array:
    return dataclasses.replace(array, cols=cols)


def _area_um2(array: Array, technology: Technology) -> float:
    return float(sum(array_area_um2(array, technology).values()))


def compare(
    network: Network,
    designs: Mapping[str, Array | Design],
    *,
    by: Match | None = None,
    technology: Technology = HOROWITZ_45NM,
) -> pd.DataFrame:
    """Evaluates designs on a network against the first of them.

    Args:
      network: the layers.
      designs: arrays by name, with operands where they need or profit from them (`Design`); the
        first is the baseline.
      by: ``area`` or ``throughput`` to give every array as many columns as match the baseline's
        (`match`); None to take arrays as they are.
      technology: energies and areas; without the areas that a design needs its area is NaN.

    Returns:
      One row a design: its size, area of PEs and encoders in mm², cycles and speedup, utilization,
      energies in µJ, and the savings: of array energy without and with the encoder, and of all
      energy.

    Raises:
      ValueError: no designs, or what `match` and `evaluate` refuse.
      TypeError: designs that are not a mapping of arrays or `Design`.
    """
    chosen = _as_designs(designs)
    if not chosen:
        raise ValueError("nothing to compare: give at least a baseline")
    reference = next(iter(chosen.values()))
    if by is not None:
        chosen = {
            name: design
            if design is reference
            else match(design, reference, network, by=by, technology=technology)
            for name, design in chosen.items()
        }
    reports = {
        name: evaluate(
            network,
            design.array,
            budgets=design.budgets,
            weights=design.weights,
            activations=design.activations,
            technology=technology,
        )
        for name, design in chosen.items()
    }
    baseline = next(iter(reports.values()))
    rows = [
        _row(chosen[name].array, report, baseline, technology) for name, report in reports.items()
    ]
    return pd.DataFrame(rows, index=pd.Index(list(chosen), name="design"))


def _as_designs(designs: Mapping[str, Array | Design]) -> dict[str, Design]:
    if not isinstance(designs, Mapping):
        raise TypeError(
            "designs must be a mapping from names to arrays or Designs, such as "
            f'{{"int8": array}}, got {type(designs).__name__}'
        )
    return {n: d if isinstance(d, Design) else Design(array=d) for n, d in designs.items()}


def _known_area_um2(array: Array, technology: Technology) -> float:
    """NaN where the table lacks an area."""
    try:
        return _area_um2(array, technology)
    except MissingEntryError:
        return math.nan


def _row(
    array: Array, report: Report, baseline: Report, technology: Technology
) -> dict[str, object]:
    energies = {f"{name}_uj": 1e-6 * e.sum() for name, e in report.energy_pj.items()}
    busy = (report.utilization * report.cycles).sum() / report.total_cycles
    return {
        "pe": type(array.pe).__name__,
        "rows": array.rows,
        "cols": array.cols,
        "area_mm2": 1e-6 * _known_area_um2(array, technology),
        "cycles": report.total_cycles,
        "speedup": baseline.total_cycles / report.total_cycles,
        "utilization": busy,
        **energies,
        "array_saving": computational_saving(baseline, report),
        "array_saving_with_encoder": computational_saving(baseline, report, encoder=True),
        "total_saving": baseline.total_energy_pj / report.total_energy_pj,
    }


def int8_baseline(pe: PE) -> DotProduct:
    """The int8 PE of least energy by gates in a PE's throughput class: a dot product of 1 or of 8.

    The class is that of multiplications a cycle, at eight bits and, for group PEs, at one term a
    weight; a PE belongs to that dot product whose rate is nearer in ratio.
    """
    rate = pe.nominal_macs(pe.group_size if isinstance(pe, GroupPE) else None)
    lanes = min(gates.DOT_LANES, key=lambda lanes: abs(math.log(rate / lanes)))
    return DotProduct(lanes=lanes)


def compare_by_gates(
    network: Network,
    designs: Mapping[str, Array | Design],
    *,
    technology: Technology = NANGATE_45NM_GATES,
) -> pd.DataFrame:
    """Computational energy by gates, and the saving over the strongest measured int8 PEs.

    Args:
      network: the layers.
      designs: arrays by name, as in `compare`; none of them is the baseline.
      technology: a table by gates.

    Returns:
      One row a design. ``pj_per_mac``: array energy for each multiply-accumulate of the network;
      ``encoder_pj_per_mac``: that of the array's edge, NaN where it was not measured;
      ``class_lanes``: of the `int8_baseline`; ``saving``, ``saving_with_encoder``: of array energy
      over that baseline on the same array; ``saving_over_dot_8``: over the dot product of 8
      whatever the class, the int8 PE of least energy in the table; ``um2_per_mac``: area of PEs
      and edge for each multiplication a cycle (`peak_macs`), NaN where one was not measured;
      ``reason``: why energies are NaN, else empty.

    Raises:
      ValueError: the technology is not by gates, or what `evaluate` refuses, save PEs that were not
        measured.
      TypeError: designs that are not a mapping of arrays or `Design`.
    """
    if technology.basis != "gates":
        raise ValueError(f"technology {technology.name!r} is by the table, not by gates")
    chosen = _as_designs(designs)
    rows = [_gates_row(network, design, technology) for design in chosen.values()]
    return pd.DataFrame(rows, index=pd.Index(list(chosen), name="design"))


def _gates_row(network: Network, design: Design, technology: Technology) -> dict[str, object]:
    baseline = int8_baseline(design.array.pe)

    def report(pe: PE, **operands: Any) -> Report:
        array = dataclasses.replace(design.array, pe=pe)
        given = {"activations": design.activations, "technology": technology, **operands}
        return evaluate(network, array, **given)

    row: dict[str, object] = dict.fromkeys(_GATES_COLUMNS, math.nan)
    row |= {"class_lanes": baseline.lanes, "reason": ""}
    try:
        ours = report(design.array.pe, budgets=design.budgets, weights=design.weights)
    except MissingEntryError as error:
        return row | {"reason": str(error)}
    int8, strongest = report(baseline), report(DotProduct(lanes=max(gates.DOT_LANES)))
    row["pj_per_mac"] = ours.energy_pj["array"].sum() / network.macs
    row["saving"] = computational_saving(int8, ours)
    row["saving_over_dot_8"] = computational_saving(strongest, ours)
    row["um2_per_mac"] = _known_area_um2(design.array, technology) / _peak_macs(design.array, ours)
    # Serialisers and schedulers of the digit-serial PEs are not in the table.
    if isinstance(design.array.pe, GroupPE | BitParallel | DotProduct):
        row["encoder_pj_per_mac"] = ours.energy_pj["encoder"].sum() / network.macs
        row["saving_with_encoder"] = computational_saving(int8, ours, encoder=True)
    return row


def sensitivity(
    figure: Callable[[Technology], Real], technology: Technology = HOROWITZ_45NM
) -> pd.DataFrame:
    """Sensitivity of a figure to each energy entry.

    Args:
      figure: a scalar of the technology, such as a `computational_saving`; must be traceable.
      technology: the table around which to move.

    Returns:
      One row an entry: ``pj``; ``elasticity``, the percent that the figure gains for each percent
      of the entry; the figure with the entry ``halved`` and ``doubled``; its ``source``.
    """

    def log_figure(log_energies: dict[str, jax.Array]) -> jax.Array:
        energies = {name: jax.numpy.exp(value) for name, value in log_energies.items()}
        return jax.numpy.log(figure(dataclasses.replace(technology, energy_pj=energies)))

    logs = {name: jax.numpy.log(value) for name, value in technology.energy_pj.items()}
    elasticity = jax.grad(log_figure)(logs)
    sources = dict(technology.sources)
    rows = {
        name: {
            "pj": value,
            "elasticity": float(elasticity[name]),
            **{
                label: float(figure(technology.replace(source="scaled", **{name: moved})))
                for label, moved in (("halved", 0.5 * value), ("doubled", 2.0 * value))
            },
            "source": sources[f"energy_pj.{name}"],
        }
        for name, value in technology.energy_pj.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")

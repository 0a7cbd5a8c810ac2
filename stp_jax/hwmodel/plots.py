"""Figures of reports, each drawn on given Matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stp_jax.hwmodel.arrays import Array, fold
from stp_jax.hwmodel.memory import port_bytes
from stp_jax.hwmodel.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_energy(
    ax: Axes, reports: Mapping[str, Report], *, components: tuple[str, ...] = ()
) -> Axes:
    """Stacked bars of energy by component in µJ, one bar a report; all components by default."""
    names = list(reports)
    shown = components or tuple(next(iter(reports.values())).energy_pj)
    bottom = np.zeros(len(names))
    for component in shown:
        energy = np.array([1e-6 * r.energy_pj[component].sum() for r in reports.values()])
        ax.bar(names, energy, bottom=bottom, label=component)
        bottom += energy
    ax.set_ylabel("energy (µJ)")
    ax.legend()
    return ax


def roofline(report: Report, array: Array) -> pd.DataFrame:
    """Roofline plot: each layer's throughput over its operational intensity.

    A layer's roof of computation is what it would do if its PEs never idled: its
    multiply-accumulates over the PE-cycles that hold its work, times the number of PEs. That is its
    real rate, of its own operands, budget and ragged groups, where the PE's nominal one supposes
    8-bit digits.

    Args:
      report: of concrete numbers, from `evaluate`.
      array: the array that it was evaluated on.

    Returns:
      One row a layer: ``intensity`` in MAC per DRAM byte; in MAC a cycle, ``achieved``, the roofs
      ``compute``, ``memory`` (DRAM's bandwidth) and ``sram`` (that of the busiest buffer's port),
      and ``attainable``, the lowest of them; ``bound``, the name of that one.
    """
    macs = report.operations["macs"]
    busy = np.asarray(report.utilization * report.cycles)
    # Without any work (no term in any weight) nothing limits the computation.
    rate = np.divide(macs, busy, out=np.full(len(macs), np.inf), where=busy > 0)
    intensity = macs / report.dram_bytes
    # Of several arrays, each has ports of its own.
    share = fold(report.network, array).parallel_share
    busiest = np.max(port_bytes(report.sram_bytes, share), axis=0)
    roofs = {
        "compute": rate,
        "memory": intensity * array.dram_bandwidth,
        "sram": macs / busiest * array.sram_bandwidth,
    }
    heights = np.array(list(roofs.values()))
    return pd.DataFrame(
        {
            "intensity": intensity,
            "achieved": macs / report.cycles,
            **roofs,
            "attainable": heights.min(axis=0),
            "bound": np.array(list(roofs))[heights.argmin(axis=0)],
        },
        index=pd.Index(report.network.names, name="layer"),
    )


def plot_roofline(ax: Axes, report: Report, array: Array) -> Axes:
    """Layers under the roof of a finite DRAM bandwidth, log-log.

    The flat roof is that of the layer with the fastest computation; layers of larger budgets, or
    whose SRAM ports are the limit, have lower ones (`roofline`).

    Raises:
      ValueError: the array's bandwidth is infinite, which has no slanted roof.
    """
    if not np.isfinite(array.dram_bandwidth):
        raise ValueError("a roofline needs a finite dram_bandwidth")
    points = roofline(report, array)
    rates = points["compute"][np.isfinite(points["compute"])]
    peak = float(rates.max()) if len(rates) else np.inf
    low, high = points["intensity"].min() / 2, points["intensity"].max() * 2
    ridge = 2 * peak / array.dram_bandwidth if len(rates) else high
    x = np.geomspace(low, max(high, ridge), 200)
    ax.loglog(x, np.minimum(peak, x * array.dram_bandwidth), color="black", label="roof")
    ax.loglog(points["intensity"], points["achieved"], "o", label=report.network.name)
    ax.set_xlabel("operational intensity (MAC per DRAM byte)")
    ax.set_ylabel("throughput (MAC per cycle)")
    ax.legend()
    return ax


def plot_sensitivity(ax: Axes, frame: pd.DataFrame, *, figure: str = "saving") -> Axes:
    """Bars from each entry halved to doubled, widest on top, of what `sensitivity` returned."""
    moved = frame[frame["elasticity"] != 0]
    width = (moved["doubled"] - moved["halved"]).abs()
    moved = moved.loc[width.sort_values().index]
    ax.barh(moved.index, moved["doubled"] - moved["halved"], left=moved["halved"])
    ax.plot(moved["doubled"], moved.index, "k>", label="entry doubled")
    ax.plot(moved["halved"], moved.index, "k<", label="entry halved")
    ax.set_xlabel(figure)
    ax.legend()
    return ax

"""Figures of reports: each takes and returns Matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from stp_jax.hwmodel.arrays import Array
from stp_jax.hwmodel.report import Report


def plot_energy(ax: Any, reports: Mapping[str, Report], *, components: tuple[str, ...] = ()) -> Any:
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
    """Where each layer stands under the array's roof.

    Returns:
      One row a layer: ``intensity`` in MAC per DRAM byte, ``achieved`` and ``attainable`` in MAC a
      cycle, the latter the lesser of the PEs' nominal peak and intensity times bandwidth, and
      ``bound``, ``compute`` or ``memory``.
    """
    macs = report.operations["macs"]
    peak = array.rows * array.cols * array.pe.nominal_macs(report.budgets) * np.ones(len(macs))
    intensity = macs / report.dram_bytes
    memory = intensity * array.dram_bandwidth
    return pd.DataFrame(
        {
            "intensity": intensity,
            "achieved": macs / report.cycles,
            "attainable": np.minimum(peak, memory),
            "bound": np.where(memory < peak, "memory", "compute"),
        },
        index=pd.Index(report.network.names, name="layer"),
    )


def plot_roofline(ax: Any, report: Report, array: Array) -> Any:
    """Layers under the roof of a finite DRAM bandwidth, log-log.

    Raises:
      ValueError: the array's bandwidth is infinite, which has no slanted roof.
    """
    if not np.isfinite(array.dram_bandwidth):
        raise ValueError("a roofline needs a finite dram_bandwidth")
    points = roofline(report, array)
    peak = float(np.max(array.rows * array.cols * array.pe.nominal_macs(report.budgets)))
    low, high = points["intensity"].min() / 2, points["intensity"].max() * 2
    x = np.geomspace(low, max(high, 2 * peak / array.dram_bandwidth), 200)
    ax.loglog(x, np.minimum(peak, x * array.dram_bandwidth), color="black", label="roof")
    ax.loglog(points["intensity"], points["achieved"], "o", label=report.network.name)
    ax.set_xlabel("operational intensity (MAC per DRAM byte)")
    ax.set_ylabel("throughput (MAC per cycle)")
    ax.legend()
    return ax


def plot_sensitivity(ax: Any, frame: pd.DataFrame, *, figure: str = "saving") -> Any:
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

"""Encoders at the array's edge: integers become terms on their way in, once for all columns.

Weights enter at the rows' edge where inputs are resident, and else at the columns'. Each of these
rows or columns has one encoder for every weight of a group, before a serialiser that emits one term
a cycle. The next group is encoded while the previous one's last term leaves, so the one cycle of
latency never stalls the array, and area and energy are shared by the PEs behind it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import pandas as pd

from stp_jax.hwmodel import gates
from stp_jax.hwmodel.arrays import Array
from stp_jax.hwmodel.group_pe import GroupPE
from stp_jax.hwmodel.numbers import Real
from stp_jax.hwmodel.pes import refuse_unmeasured
from stp_jax.hwmodel.technology import HOROWITZ_45NM, Technology
from stp_jax.terms import ENCODINGS

EncoderKind = Literal["naf", "booth2", "booth4"]
LATENCY_CYCLES = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeEncoders:
    """The encoders of one array.

    Attributes:
      count: encoders, g a row where inputs are resident, else g a column.
      latency_cycles: from a stored group to its first term; hidden by prefetching.
      area_um2: of all of them.
      area_per_pe_um2: shared by the array's PEs.
      pj_per_weight: energy of encoding a weight once.
      pj_per_use: that energy shared by the PEs that a weight passes on its way: the columns where
        inputs are resident, the rows where outputs are; a resident weight stays in one PE.
    """

    count: Real
    latency_cycles: int
    area_um2: Real
    area_per_pe_um2: Real
    pj_per_weight: Real
    pj_per_use: Real


def edge_encoders(
    array: Array, *, kind: EncoderKind | None = None, technology: Technology = HOROWITZ_45NM
) -> EdgeEncoders | None:
    """Encoders of an array of `GroupPE`, by default of its encoding; None if it needs none.

    Raises:
      ValueError: the array has no group PEs, or the technology lacks the encoder.
    """
    if not isinstance(array.pe, GroupPE):
        raise ValueError(f"{type(array.pe).__name__} takes no encoded terms")
    entry = ENCODINGS[array.pe.encoding].encoder if kind is None else f"encode_{kind}"
    if entry is None or (kind is None and array.pe.packed):
        return None
    technology.require([entry])
    technology.require([entry], kind="area_um2")
    # Rows or columns at whose edge weights enter, and PEs that use a weight once it has.
    edge, users = {
        "is": (array.rows, array.cols),
        "ws": (array.cols, 1),
        "os": (array.cols, array.rows),
    }[array.dataflow]
    count = edge * array.pe.group_size
    area = count * technology.area_um2[entry]
    energy = technology.energy_pj[entry]
    return EdgeEncoders(
        count=count,
        latency_cycles=LATENCY_CYCLES,
        area_um2=area,
        area_per_pe_um2=area / (array.rows * array.cols),
        pj_per_weight=energy,
        pj_per_use=energy / users,
    )


def array_area_um2(array: Array, technology: Technology = HOROWITZ_45NM) -> dict[str, Real]:
    """Area of the PEs and edge encoders of all arrays, µm², without buffers.

    By gates an edge includes the rows' serialisers, and those of packed terms are left out.

    Raises:
      MissingEntryError: the technology lacks an area; by gates, a PE that was not measured.
    """
    places = array.count * array.rows * array.cols
    area = {"pes": places * array.pe.area_um2(technology), "encoders": 0.0}
    if isinstance(array.pe, GroupPE):
        if technology.basis == "gates":
            area["encoders"] = array.count * _edge_by_gates(array, array.pe, technology)
        elif encoders := edge_encoders(array, technology=technology):
            area["encoders"] = array.count * encoders.area_um2
    return area


def _edge_by_gates(array: Array, pe: GroupPE, technology: Technology) -> Real:
    """Area of the edges of an array's rows, whose encoders are of naf."""
    if pe.packed:
        return 0.0
    if type(pe) is not GroupPE or pe.encoding != "naf" or array.dataflow != "is":
        refuse_unmeasured(pe, array.dataflow)
    _, entry = gates.group_area_names(pe.lanes, pe.bits)
    technology.require([entry], kind="area_um2")
    return array.rows * technology.area_um2[entry]


def encoder_table(array: Array, technology: Technology = HOROWITZ_45NM) -> pd.DataFrame:
    """The three encoders at this array's edge, one row each."""
    kinds: tuple[EncoderKind, ...] = ("naf", "booth2", "booth4")
    rows = [edge_encoders(array, kind=kind, technology=technology) for kind in kinds]
    found = [dataclasses.asdict(row) for row in rows if row is not None]
    return pd.DataFrame(found, index=pd.Index(kinds, name="encoder"))

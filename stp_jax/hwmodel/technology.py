"""Technology tables: energy per event and area per block, each entry with its source.

The default is 45 nm: arithmetic, SRAM and DRAM from Horowitz, "Computing's energy problem (and
what we can do about it)", ISSCC 2014, fig. 1.1.9. A table speaks of one node; entries that had to
be derived say so in their source.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import jax

from stp_jax.hwmodel.numbers import Real, namespace_of

_SRAM_BYTES = {"sram_8kib_64b": 8 << 10, "sram_32kib_64b": 32 << 10, "sram_1mib_64b": 1 << 20}


Basis = Literal["table", "gates"]


class MissingEntryError(ValueError):
    """A table lacks an entry that is needed."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Technology:
    """Energy in pJ per event and area in µm² per block, at one process node.

    The energies and areas are pytree leaves, so a table may be differentiated or swept.

    Raises:
      ValueError: an entry is not positive and finite, or has no source.
    """

    name: str = dataclasses.field(metadata={"static": True})
    node_nm: float = dataclasses.field(metadata={"static": True})
    energy_pj: Mapping[str, Real]
    area_um2: Mapping[str, Real]
    # Pairs of ``energy_pj.ENTRY`` or ``area_um2.ENTRY`` and where the number comes from.
    sources: tuple[tuple[str, str], ...] = dataclasses.field(metadata={"static": True})
    # ``table``: arithmetic, registers and encoders by operation. ``gates``: whole PEs by event,
    # measured on their netlists (`stp_jax.hwmodel.gates`).
    basis: Basis = dataclasses.field(default="table", metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the basis, and that every entry is positive and has a source."""
        if self.basis not in get_args(Basis):
            raise ValueError(f"{self.name}: basis must be table or gates, got {self.basis!r}")
        sourced = {entry for entry, source in self.sources if source}
        for kind in ("energy_pj", "area_um2"):
            for entry, value in getattr(self, kind).items():
                name = f"{kind}.{entry}"
                if isinstance(value, int | float) and not (value > 0 and math.isfinite(value)):
                    raise ValueError(f"{self.name}: {name} must be positive, got {value}")
                if name not in sourced:
                    raise ValueError(f"{self.name}: {name} has no source")

    def require(self, entries: Iterable[str], *, kind: str = "energy_pj") -> None:
        """Raises MissingEntryError that lists every one of ``entries`` that the table lacks."""
        missing = sorted(set(entries) - set(getattr(self, kind)))
        if missing:
            raise MissingEntryError(
                f"technology {self.name!r} ({self.node_nm:g} nm) has no {kind} entry for "
                f"{', '.join(missing)}; it has {', '.join(sorted(getattr(self, kind)))}"
            )

    def replace(self, *, source: str, **energies: Real) -> Technology:
        """The same table with other energies (pJ), whose source is given."""
        self.require(energies)
        changed = {f"energy_pj.{entry}" for entry in energies}
        sources = tuple((e, source if e in changed else s) for e, s in self.sources)
        return dataclasses.replace(self, energy_pj={**self.energy_pj, **energies}, sources=sources)

    def sram_pj_per_byte(self, capacity: Real) -> Real:
        """Energy of one byte at an SRAM of ``capacity`` bytes, shape of ``capacity``.

        Derived: linear in log-log between the table's capacities (a power law), held constant
        below the smallest and continued with the last segment's exponent above the largest.
        """
        self.require(_SRAM_BYTES)
        xp = namespace_of(capacity, *self.energy_pj.values())
        sizes = [math.log(size) for size in _SRAM_BYTES.values()]
        energy = [xp.log(xp.asarray(self.energy_pj[entry] * 1.0)) for entry in _SRAM_BYTES]
        slopes = [
            (energy[i + 1] - energy[i]) / (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1)
        ]
        x = xp.log(xp.asarray(capacity * 1.0))
        low = energy[0] + slopes[0] * xp.maximum(x - sizes[0], 0.0)
        high = energy[1] + slopes[1] * (x - sizes[1])
        return xp.exp(xp.where(x < sizes[1], low, high)) / 8.0


_HOROWITZ = "Horowitz, ISSCC 2014, 45 nm 0.9 V"
_HOROWITZ_TABLE = f"{_HOROWITZ}; as tabulated by Sze et al., Proc. IEEE 105(12), 2017"
_SHIFTADD = "You et al., ShiftAddNet, NeurIPS 2020, table 1, 45 nm"
_REGISTER = (
    "derived: 0.0090 pJ per bit and clock in Aladdin's 40 nm table (Shao et al., ISCA 2014, public "
    "release), times 45/40 for capacitance at equal voltage"
)
_ENCODER = (
    "derived: synthesised area at the energy density of Horowitz's 8-bit adder (0.03 pJ, 36 µm²)"
)
_HESE = "assumed: that of the NAF encoder, whose digits the published rule gives"
_DALLY = "Dally, tutorial High-Performance Hardware for Machine Learning, NIPS 2015: 45 nm"
SHIFT_MULTIPLEXERS = 36  # two-input multiplexers of an 8-bit shifter, the unit of selection energy
_SHIFTER = (
    f"derived: {SHIFT_MULTIPLEXERS} two-input multiplexers MUX2_X1 (1.862 µm²) of Nangate's 45 nm "
    "library"
)
_SYNTHESIS = "synthesis to the Nangate 45 nm Open Cell Library, area only"
_LANES = (
    "synthesis of rtl/gpe_lanes.v to the Nangate 45 nm Open Cell Library, partial sums of 28 bits"
)

_ENERGY_45NM: dict[str, tuple[float, str]] = {
    "int8_add": (0.03, _HOROWITZ),
    "int16_add": (0.05, _HOROWITZ_TABLE),
    "int32_add": (0.1, _HOROWITZ),
    "int8_multiply": (0.2, _HOROWITZ),
    "int32_multiply": (3.1, _HOROWITZ),
    "int8_shift": (0.024, _SHIFTADD),
    "register_bit": (0.0101, _REGISTER),
    "encode_naf": (0.03 * 29.8 / 36, _ENCODER),
    "encode_hese": (0.03 * 29.8 / 36, _HESE),
    "encode_booth2": (0.03 * 19.7 / 36, _ENCODER),
    "encode_booth4": (0.03 * 20.5 / 36, _ENCODER),
    "sram_8kib_64b": (10.0, _HOROWITZ),
    "sram_32kib_64b": (20.0, _HOROWITZ),
    "sram_1mib_64b": (100.0, _HOROWITZ),
    "dram_64b": (1300.0, f"{_HOROWITZ}: 1.3 to 2.6 nJ, the lower end"),
}
_AREA_45NM: dict[str, tuple[float, str]] = {
    "bit_parallel_pe": (1030.0, _SYNTHESIS),
    "term_lane": (462.0, _SYNTHESIS),
    "group_pe_8": (1014.0, f"{_SYNTHESIS}; 8 resident activations"),
    "group_pe_8_of_2_lanes": (943.5, f"{_LANES}; 2 lanes"),
    "group_pe_8_of_8_lanes": (2425.9, f"{_LANES}; 8 lanes"),
    "int8_add": (36.0, _DALLY),
    "int16_add": (67.0, _DALLY),
    "int32_add": (137.0, _DALLY),
    "int8_multiply": (282.0, _DALLY),
    "int8_shift": (67.0, _SHIFTER),
    "register_bit": (4.522, "flip-flop DFF_X1 of the Nangate 45 nm Open Cell Library"),
    "encode_naf": (29.8, _SYNTHESIS),
    "encode_hese": (29.8, _HESE),
    "encode_booth2": (19.7, _SYNTHESIS),
    "encode_booth4": (20.5, _SYNTHESIS),
}

HOROWITZ_45NM = Technology(
    name="45 nm",
    node_nm=45.0,
    energy_pj={entry: value for entry, (value, _) in _ENERGY_45NM.items()},
    area_um2={entry: value for entry, (value, _) in _AREA_45NM.items()},
    sources=tuple(
        (f"{kind}.{entry}", source)
        for kind, table in (("energy_pj", _ENERGY_45NM), ("area_um2", _AREA_45NM))
        for entry, (_, source) in table.items()
    ),
)

_CONDITIONS = "gates of rtl/mac_pe.v, gpe.v and weight_edge.v"
_NANGATE = (
    "`python benchmarks/rtl_tables.py --liberty nangate45_typical.lib --node-nm 45`: "
    f"{_CONDITIONS} in the Nangate 45 nm Open Cell Library, 1.1 V, 2 ns, 1 fF of wire per pin"
)
_SKY130 = (
    "`python benchmarks/rtl_tables.py --liberty sky130hd_tt.lib.gz --node-nm 130 --wire 2.5 "
    f"--clock-ns 7`: {_CONDITIONS} in SkyWater's sky130_fd_sc_hd, 1.8 V, 7 ns, 2.5 fF of wire "
    "per pin"
)
_GATES_45NM = {
    "mac": 2.319,
    "mac_bit": 0.1246,
    "mac_load": 0.8801,
    "group": 2.465,
    "group_second_term": 2.177,
    "group_third_term": 2.07,
    "group_further_term": 1.584,
    "group_live_term": 0.8636,
    "group_live_pair": 1.284,
    "group_first_empty_slot": 2.361,
    "group_further_empty_slot": 0.3273,
    "group_load": 1.411,
    "edge_group": 1.56,
    "edge_second_slot": 1.659,
    "edge_further_slot": 0.9728,
}
_NANGATE_LANES = (
    "`python benchmarks/rtl_tables.py --liberty nangate45_typical.lib --node-nm 45 --clock-ns 3.4 "
    "--group-pe gpe_lanes_4 gpe_lanes_2 gpe_lanes_4_w4 gpe_lanes_2_w4`: gates of rtl/gpe_lanes.v "
    "and weight_edge.v with 4 and 2 lanes, for weights of 8 and 4 bits, in the "
    "Nangate 45 nm Open Cell Library, 1.1 V, 3.4 ns, 1 fF of wire per pin"
)
_GATES_LANES_45NM = {
    "pass_4": 1.34,
    "pass_4_moved_lane": 0.2378,
    "pass_4_bit": 0.0262,
    "pass_4_load": 1.139,
    "pass_4_bus": 0.9561,
    "edge_4_group": 2.307,
    "edge_4_second_term": 0.5409,
    "edge_4_third_term": 0.4345,
    "edge_4_further_pass": 0.6802,
    "edge_4_early_term": 0.9083,
    "edge_4_vacant_lane": 0.1055,
    "pass_2": 0.8325,
    "pass_2_moved_lane": 0.2308,
    "pass_2_bit": 0.02333,
    "pass_2_load": 3.701,
    "pass_2_bus": 0.602,
    "edge_2_group": 2.182,
    "edge_2_early_term": 0.9139,
    "edge_2_vacant_lane": 0.434,
    "pass_4_w4": 1.102,
    "pass_4_w4_moved_lane": 0.1593,
    "pass_4_w4_bit": 0.02527,
    "pass_4_w4_load": 3.535,
    "pass_4_w4_bus": 0.7971,
    "edge_4_w4_group": 1.148,
    "edge_4_w4_second_term": 0.2573,
    "edge_4_w4_third_term": 0.383,
    "edge_4_w4_early_term": 0.5166,
    "pass_2_w4": 0.6868,
    "pass_2_w4_moved_lane": 0.1727,
    "pass_2_w4_bit": 0.02332,
    "pass_2_w4_load": 4.179,
    "pass_2_w4_bus": 0.532,
    "edge_2_w4_group": 1.046,
    "edge_2_w4_second_term": 0.2028,
    "edge_2_w4_further_pass": 0.4223,
    "edge_2_w4_early_term": 0.2969,
}
_GATES_LANES_AREA_45NM = {
    "group_pe_8_of_4_lanes": 1465.0,
    "row_edge_8_of_4_lanes": 2453.0,
    "group_pe_8_of_2_lanes": 962.9,
    "row_edge_8_of_2_lanes": 1661.0,
    "group_pe_8_of_4_lanes_w4": 1309.0,
    "row_edge_8_of_4_lanes_w4": 1130.0,
    "group_pe_8_of_2_lanes_w4": 867.2,
    "row_edge_8_of_2_lanes_w4": 772.5,
}
_NANGATE_OTHERS = (
    "`python benchmarks/rtl_tables.py --liberty nangate45_typical.lib --node-nm 45 --clock-ns 3.4 "
    "--others`: gates of benchmarks/rtl/verilog in the Nangate 45 nm Open Cell Library, 1.1 V, "
    "3.4 ns, 1 fF of wire per pin"
)
_GATES_OTHERS_45NM = {
    "dot_1_step": 1.086,
    "dot_1_bit": 0.09632,
    "dot_1_load": 0.4971,
    "dot_1_bus": 0.4062,
    "dot_8_step": 3.748,
    "dot_8_bit": 0.06752,
    "dot_8_load": 3.996,
    "dot_8_bus": 1.211,
    "dot_8_w4_step": 2.234,
    "dot_8_w4_bit": 0.01615,
    "dot_8_w4_load": 2.653,
    "dot_8_w4_bus": 0.7693,
    "dot_8_w3_step": 1.616,
    "dot_8_w3_bit": 0.01943,
    "dot_8_w3_load": 2.097,
    "dot_8_w3_bus": 0.6616,
    "dot_8_w2_step": 1.117,
    "dot_8_w2_bit": 0.02784,
    "dot_8_w2_load": 1.741,
    "dot_8_w2_bus": 0.5551,
    "stripes_group": 1.02,
    "stripes_cycle": 0.8076,
    "stripes_bit": 0.03381,
    "stripes_load": 1.463,
    "stripes_bus": 0.4789,
    "pragmatic_group": 1.386,
    "pragmatic_cycle": 0.6815,
    "pragmatic_term": 0.4044,
    "pragmatic_bit": 0.01592,
    "pragmatic_load": 2.11,
    "pragmatic_bus": 0.8305,
    "bitwave_group": 0.5339,
    "bitwave_cycle": 1.953,
    "bitwave_bit": 0.006188,
    "bitwave_load": 1.565,
    "bitwave_bus": 0.592,
    "bitvert_group": 9.592,
    "bitvert_changed_column": 0.953,
    "bitvert_bit": 0.0362,
    "bitvert_load": 3.393,
    "bitvert_bus": 0.6007,
    "term_mac_group": 2.166,
    "term_mac_slot": 2.225,
    "term_mac_pair": 1.735,
    "term_mac_load": 3.964,
    "term_mac_bus": 1.523,
}
_GATES_OTHERS_AREA_45NM = {
    "dot_1_pe": 711.0,
    "dot_8_pe": 3965.0,
    "dot_8_w4_pe": 2111.0,
    "dot_8_w3_pe": 1680.0,
    "dot_8_w2_pe": 1272.0,
    "stripes_pe": 1249.0,
    "pragmatic_pe": 2133.0,
    "bitwave_pe": 1434.0,
    "bitvert_pe": 1889.0,
    "term_mac_pe": 3417.0,
}
_GATES_AREA_45NM = {
    "bit_parallel_pe": 1256.0,
    "group_pe_8": 1140.0,
    "row_edge_8": 1325.0,
}
_GATES_130NM = {
    "mac": 10.74,
    "mac_bit": 0.7382,
    "mac_load": 4.196,
    "group": 12.72,
    "group_second_term": 12.56,
    "group_third_term": 11.87,
    "group_further_term": 9.704,
    "group_live_term": 4.144,
    "group_live_pair": 4.96,
    "group_first_empty_slot": 14.72,
    "group_further_empty_slot": 1.433,
    "group_load": 8.053,
    "edge_group": 7.839,
    "edge_second_slot": 7.918,
    "edge_further_slot": 4.602,
}
_GATES_AREA_130NM = {
    "bit_parallel_pe": 6954.0,
    "group_pe_8": 5994.0,
    "row_edge_8": 5994.0,
}
_MEMORY = (*_SRAM_BYTES, "dram_64b")
_SUPPLY_45NM = 0.9


def _memory(node_nm: float, supply: float) -> dict[str, tuple[float, str]]:
    """Memory's entries: SRAM scaled by node and supply squared; DRAM is another chip."""
    entries = {}
    for entry in _MEMORY:
        value, source = _ENERGY_45NM[entry]
        if node_nm != HOROWITZ_45NM.node_nm and entry in _SRAM_BYTES:
            value *= node_nm / HOROWITZ_45NM.node_nm * (supply / _SUPPLY_45NM) ** 2
            source = f"derived: {source}, times node and supply squared"
        entries[entry] = (value, source)
    return entries


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What one command measured: energies in pJ and areas in um2."""

    source: str
    energy_pj: Mapping[str, float]
    area_um2: Mapping[str, float]


def _by_gates(node_nm: float, supply: float, *parts: _Measured) -> Technology:
    """A measured table, with memory beside it."""
    memory = _memory(node_nm, supply)
    measured = {name: value for part in parts for name, value in part.energy_pj.items()}
    return Technology(
        name=f"{node_nm:g} nm by gates",
        node_nm=node_nm,
        basis="gates",
        energy_pj={**measured, **{entry: value for entry, (value, _) in memory.items()}},
        area_um2={name: value for part in parts for name, value in part.area_um2.items()},
        sources=(
            *((f"energy_pj.{entry}", part.source) for part in parts for entry in part.energy_pj),
            *((f"area_um2.{entry}", part.source) for part in parts for entry in part.area_um2),
            *((f"energy_pj.{entry}", of_memory) for entry, (_, of_memory) in memory.items()),
        ),
    )


NANGATE_45NM_GATES = _by_gates(
    45.0,
    1.1,
    _Measured(_NANGATE, _GATES_45NM, _GATES_AREA_45NM),
    _Measured(_NANGATE_LANES, _GATES_LANES_45NM, _GATES_LANES_AREA_45NM),
    _Measured(_NANGATE_OTHERS, _GATES_OTHERS_45NM, _GATES_OTHERS_AREA_45NM),
)
SKY130_130NM_GATES = _by_gates(130.0, 1.8, _Measured(_SKY130, _GATES_130NM, _GATES_AREA_130NM))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_technology(path: str | Path) -> Technology:
    """Reads a table from JSON or TOML.

    The file has ``name``, ``node_nm``, perhaps ``basis``, and two tables, ``energy_pj`` and
    ``area_um2`` (may be absent), of entries ``{value, source, node_nm}``; an entry's own
    ``node_nm`` may be left out.

    Raises:
      ValueError: unknown suffix, missing keys, values or sources, or an entry of another node.
    """
    path = Path(path)
    parsers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in parsers:
        raise ValueError(f"{path}: expected a .json or .toml file")
    try:
        content = parsers[path.suffix](path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a table at the top, got {type(content).__name__}")
    absent = [key for key in ("name", "node_nm", "energy_pj") if key not in content]
    if absent:
        raise ValueError(f"{path}: lacks {', '.join(absent)}")
    node = content["node_nm"]
    tables: dict[str, Mapping] = {kind: content.get(kind, {}) for kind in ("energy_pj", "area_um2")}
    if not _is_number(node) or not node > 0:
        raise ValueError(f"{path}: node_nm must be a number of nanometres, got {node!r}")
    for kind, entries in tables.items():
        if not isinstance(entries, Mapping):
            raise ValueError(f"{path}: {kind} must be a table of entries, got {entries!r}")
        for name, entry in entries.items():
            if not isinstance(entry, Mapping) or not {"value", "source"} <= set(entry):
                raise ValueError(f"{path}: {name} needs a value and a source")
            if not _is_number(entry["value"]):
                raise ValueError(
                    f"{path}: the value of {name} must be a number, got {entry['value']!r}"
                )
            if not 0 < entry["value"] < math.inf:
                raise ValueError(
                    f"{path}: the value of {name} must be positive, got {entry['value']}"
                )
            if entry.get("node_nm", node) != node:
                raise ValueError(
                    f"{path}: {name} is at {entry['node_nm']} nm in a {node:g} nm table; "
                    "energies of different nodes must not be mixed"
                )
    return Technology(
        name=content["name"],
        node_nm=float(node),
        basis=content.get("basis", "table"),
        energy_pj={name: float(entry["value"]) for name, entry in tables["energy_pj"].items()},
        area_um2={name: float(entry["value"]) for name, entry in tables["area_um2"].items()},
        sources=tuple(
            (f"{kind}.{name}", str(entry["source"]))
            for kind, table in tables.items()
            for name, entry in table.items()
        ),
    )

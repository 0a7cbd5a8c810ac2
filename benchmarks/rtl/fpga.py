"""Energy on an FPGA: a design placed and routed by VPR, its netlist simulated with routed delays.

VTR (Murray et al., ACM TRETS 13(2), 2020) with its Stratix-IV-like 40 nm architecture: clusters of
ten fracturable 6-input look-up tables with carry chains, and hard multipliers. Its power model
(Goeders and Wilton, FPT 2012) prices look-up tables, flip-flops, routing and clock by transistors
of 45 nm at 0.9 V, and multipliers by an energy for each change of an input; carry chains have none.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.rtl.design import VERILOG, Design, Stimulus
from benchmarks.rtl.play import play
from benchmarks.rtl.synthesis import run_yosys

ARCHITECTURE = "vtr_flow/arch/timing/k6_frac_N10_frac_chain_mem32K_40nm.xml"
TECHNOLOGY = "vtr_flow/tech/PTM_45nm/45nm.xml"
CHANNEL_WIDTH = "100"  # the same for every design
OUTPUTS = {"adder": ("cout", "sumout"), "multiply": ("out",)}
HOLD_PS = 100  # from the clock's edge to the inputs' change
SLACK_PS = 400  # of the simulated clock over the critical path
CELLS = {
    "LUTs": r"^    LUT_K #\(",
    "flip-flops": r"^    DFF #\(",
    "adders": r"^    adder #\(",
    "multipliers": r"^    multiply #\(",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A placed and routed design.

    Attributes:
      directory: of VPR's files, which begin with ``design``.
      period_ns: its critical path.
      cells: primitives by kind.
    """

    directory: Path
    period_ns: float
    cells: Mapping[str, int]


def _vpr(vtr: Path, directory: Path, *options: str) -> str:
    """Runs VPR; RuntimeError with the end of what it said where it fails."""
    command = [
        *(str(vtr / "build/vpr/vpr"), str(vtr / ARCHITECTURE), "design.blif"),
        *("--route_chan_width", CHANNEL_WIDTH, *options),
    ]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vpr in {directory}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def place_and_route(design: Design, vtr: Path, directory: Path) -> Routed:
    """Synthesises a design by Yosys, with products on hard multipliers, and places it by VPR.

    Raises:
      RuntimeError: Yosys or VPR failed.
    """
    maps = [VERILOG / "vtr_cells.v", VERILOG / "vtr_map.v"]
    for source in (*design.sources, *maps):
        shutil.copy(source, directory)
    run_yosys(
        [
            "read_verilog -lib vtr_cells.v",
            f"read_verilog {' '.join(Path(source).name for source in design.sources)}",
            *(f"chparam -set {n} {value} {design.top}" for n, value in design.parameters.items()),
            f"hierarchy -check -top {design.top}",
            *("proc", "flatten", "opt -full", "wreduce", "peepopt", "opt_clean", "pmuxtree"),
            *("techmap -map vtr_map.v t:$mul", "alumacc", "opt", "techmap -map vtr_map.v"),
            *("techmap", "opt -full", "dfflegalize -cell $_DFF_P_ x", "abc -lut 6"),
            # Names that netlists of any format can hold.
            *("setundef -zero", "opt_clean -purge", "splitnets -ports -format __"),
            *("rename -hide", "rename -enumerate -pattern n%", "write_blif -blackbox mapped.blif"),
        ],
        directory,
    )
    blif = (directory / "mapped.blif").read_text()
    for word, replacement in {
        "cin=$false": "cin=unconn",  # the first cell of a chain
        ".names $undef\n": "",
        "$false": "gnd",
        "$true": "vcc",
    }.items():
        blif = blif.replace(word, replacement)
    (directory / "design.blif").write_text(blif)
    log = _vpr(vtr, directory, "--gen_post_synthesis_netlist", "on")
    netlist = (directory / f"{design.top}_post_synthesis.v").read_text()
    return Routed(
        directory=directory,
        period_ns=float(re.findall(r"Final critical path: ([\d.]+) ns", log)[-1]),
        cells={kind: len(re.findall(p, netlist, re.MULTILINE)) for kind, p in CELLS.items()},
    )


# --- Simulation with routed delays ----------------------------------------------------------------


def _delays(sdf: str) -> dict[str, dict[str, int]]:
    """Parameters of the instances in VPR's SDF file, delays in ps; the longest of several paths."""
    found = {}
    for cell in sdf.split("(CELL\n")[1:]:
        name = re.search(r"\(INSTANCE (\S+)\)", cell)[1].replace("\\", "")
        paths = re.findall(r"IOPATH (\(posedge clock\)|\S+) (\S+) \(([\d.]+):", cell)
        carry = [float(ps) for i, o, ps in paths if (i, o) == ("cin", "cout")]
        other = [float(ps) for i, o, ps in paths if (i, o) != ("cin", "cout")]
        found[name] = {"DELAY": round(max(other, default=0.0))}
        if carry:
            found[name]["CARRY_DELAY"] = round(carry[0])
    return found


def timed_netlist(netlist: str, sdf: str) -> str:
    """VPR's netlist with delays as parameters, and a name for every unconnected output."""
    delays = _delays(sdf)

    def instance(match: re.Match[str]) -> str:
        kind, parameters, name = match.groups()
        given = [f".{key}({value})" for key, value in delays.get(name, {}).items()]
        given += [parameters.strip()] if parameters else []
        return f"    {kind} #({', '.join(given)}) \\{name} "

    kinds = "fpga_interconnect|LUT_K|DFF|adder|multiply"
    pattern = rf"^ +({kinds})\s*(?:#\(((?:[^()]|\([^()]*\))*)\)\s*)?\\(\S+) "
    text = re.sub(pattern, instance, netlist, flags=re.MULTILINE)
    parts = re.split(r"(?<=[{,])(?=\s*,)|(?<=,)(?=\s*\}\))", text)
    named = [f"{part} unused_{number}" for number, part in enumerate(parts[:-1])]
    return "`timescale 1ps/1ps\n" + "".join(named) + parts[-1]


def _wrapper(stimulus: Stimulus, top: str, netlist: str) -> str:
    """A module with the design's ports around VPR's, which are single bits."""
    known = set(re.findall(r"^    (?:input|output) \\(\S+)", netlist, re.MULTILINE))
    ports = [("clock", 1, "input")]
    ports += [(name, stimulus.widths[name], "input") for name in stimulus.inputs]
    ports += [(name, stimulus.widths[name], "output") for name in stimulus.expected]
    connected = []
    for name, width, _ in ports:
        for bit in range(width):
            for inner, outer in ((f"{name}_{bit}_", f"{name}[{bit}]"), (name, name)):
                if inner in known:
                    connected.append(f".\\{inner} ({outer})")
    declared = ", ".join(f"{way} [{width - 1}:0] {name}" for name, width, way in ports)
    return f"module wrapped({declared});\n    {top} inner({', '.join(connected)});\nendmodule\n"


def simulate(design: Design, routed: Routed, stimulus: Stimulus) -> Path:
    """Value changes of the measured cycles, as a VCD file.

    Raises:
      RuntimeError: the netlist gives a value that is not the expected one.
    """
    folder = routed.directory
    netlist, sdf = (
        (folder / f"{design.top}_post_synthesis.{end}").read_text() for end in ("v", "sdf")
    )
    (folder / "timed.v").write_text(timed_netlist(netlist, sdf))
    (folder / "wrapped.v").write_text(_wrapper(stimulus, design.top, netlist))
    sources = [folder / "wrapped.v", folder / "timed.v", VERILOG / "vtr_simulation.v"]
    play(
        *(stimulus, "wrapped", sources, {}),
        period=math.ceil(1000 * routed.period_ns) + SLACK_PS,
        hold=HOLD_PS,
        directory=folder,
        dump="changes.vcd",
        flags=["-g2009"],
    )
    return folder / "changes.vcd"


def _statements(blif: str) -> Iterator[tuple[str, list[str]]]:
    """The first word of every line, and the others."""
    for line in filter(str.strip, blif.splitlines()):
        kind, *words = line.split()
        yield kind, words


def _nets_by_wire(blif: str) -> dict[str, str]:
    """The BLIF file's nets by the wires that drive them in VPR's netlist."""
    nets = {}
    for kind, words in _statements(blif):
        if kind == ".inputs":
            nets |= {f"{name}_output_0_0": name for name in words}
        elif kind == ".names":
            nets[f"lut_{words[-1]}_output_0_0"] = words[-1]
        elif kind == ".latch":
            nets[f"latch_{words[1]}_output_0_0"] = words[1]
        elif kind == ".subckt":
            pins = dict(word.split("=") for word in words[1:])
            driven = [
                (port, int(bit or 0), net)
                for pin, net in pins.items()
                for name, bit in re.findall(r"^(\w+)(?:\[(\d+)\])?$", pin)
                for port, known in enumerate(OUTPUTS[words[0]])
                if name == known and net != "unconn"
            ]
            first = min(driven)[-1]  # which names the block
            nets |= {f"{words[0]}_{first}_output_{port}_{bit}": net for port, bit, net in driven}
    return nets


def _passing_on(blif: str) -> set[str]:
    """Nets that only leave the design: the next PE's wires, as its inputs are this one's."""
    outputs, read = set[str](), set[str]()
    for kind, words in _statements(blif):
        if kind == ".outputs":
            outputs |= set(words)
        elif kind == ".names":
            read.update(words[:-1])
        elif kind == ".latch":
            read.add(words[0])
        elif kind == ".subckt":
            read.update(
                net
                for pin, net in (word.split("=") for word in words[1:])
                if re.sub(r"\[\d+\]", "", pin) not in OUTPUTS[words[0]]
            )
    return outputs - read


def write_activities(routed: Routed, changes: Path, cycles: int) -> None:
    """VPR's activity file: each net's share of time at one, and its changes a cycle."""
    blif = (routed.directory / "design.blif").read_text()
    nets, left_out = _nets_by_wire(blif), _passing_on(blif)
    codes: dict[str, str] = {}
    toggles, high = collections.Counter[str](), collections.Counter[str]()
    last: dict[str, tuple[str, int]] = {}
    scopes: list[str] = []
    begin = now = 0
    with changes.open() as lines:
        for line in lines:
            if line.startswith("$scope"):
                scopes.append(line.split()[2])
            elif line.startswith("$upscope"):
                scopes.pop()
            elif line.startswith("$var") and scopes[-1] == "inner":
                codes[line.split()[4].lstrip("\\")] = line.split()[3]
            elif line.startswith("#"):
                now = int(line[1:])
                begin = begin or now
            elif line[0] in "01x":
                value, code = line[0], line[1:].strip()
                was, since = last.get(code, (value, now))
                toggles[code] += was != value
                high[code] += (now - since) if was == "1" else 0
                last[code] = (value, now)
    for code, (value, since) in last.items():
        high[code] += (now - since) if value == "1" else 0
    with (routed.directory / "design.act").open("w") as file:
        for wire, net in nets.items():
            code = codes.get(wire)
            if net == "clock":
                share, density = 0.5, 2.0
            elif code is None or net in left_out:  # absorbed by the packer, or the next PE's
                share, density = 0.0, 0.0
            else:
                share, density = high[code] / (now - begin), toggles[code] / cycles
            file.write(f"{net} {share:.6f} {density:.6f}\n")


# --- Energy ---------------------------------------------------------------------------------------


def energy(design: Design, routed: Routed, stimulus: Stimulus, vtr: Path) -> dict[str, float]:
    """Dynamic energy in pJ for each multiply-accumulate, by part, from VPR's power model."""
    cycles = stimulus.measured[1] - stimulus.measured[0]
    write_activities(routed, simulate(design, routed, stimulus), cycles)
    given = ["--activity_file", "design.act", "--tech_properties", str(vtr / TECHNOLOGY)]
    _vpr(vtr, routed.directory, "--analysis", "--power", *given)
    report = (routed.directory / "design.power").read_text()
    scale = 1e3 * routed.period_ns * cycles / stimulus.multiplications  # W for a cycle, to pJ
    parts = {"total": "Total", "routing": "Routing", "blocks": "PB Types", "clock": "Clock"}
    found = {}
    for part, name in parts.items():
        watts, dynamic = re.search(
            rf"^ *{name} +([\d.e+-]+) +[\d.e+-]+ +([\d.e+-]+)", report, re.MULTILINE
        ).groups()
        found[part] = float(watts) * float(dynamic) * scale
    return found

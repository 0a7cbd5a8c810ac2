"""Full adders to the library's full-adder cell, which logic optimisation would not find.

A design that instantiates the module ``full_adder`` (carry_save.v) asks for it. Adders
with a constant input become plain logic first; the others stay one cell each, the library's
smallest with these two functions. A library without one gets the module's gates.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence

from benchmarks.rtl.liberty import Cell, Library, expression

MODULE = "full_adder"

# Constant inputs arrive as parameters of the mapped module: Yosys, `help techmap`.
_PLAIN = """
(* techmap_celltype = "full_adder" *)
module plain_full_adder (input a, b, c, output s, co);
    parameter _TECHMAP_CONSTMSK_a_ = 0;
    parameter _TECHMAP_CONSTMSK_b_ = 0;
    parameter _TECHMAP_CONSTMSK_c_ = 0;
    wire _TECHMAP_FAIL_ =
        !(_TECHMAP_CONSTMSK_a_ | _TECHMAP_CONSTMSK_b_ | _TECHMAP_CONSTMSK_c_) & {keep};
    assign s = a ^ b ^ c;
    assign co = (a & b) | (c & (a | b));
endmodule
"""
_CONSTANTS_TRAVEL = 6  # levels of adders through which a constant may have to pass


def uses_full_adders(sources: Sequence[pathlib.Path]) -> bool:
    """Whether the Verilog instantiates the module."""
    return any(f"module {MODULE} " in pathlib.Path(source).read_text() for source in sources)


def full_adder_cell(library: Library) -> tuple[Cell, dict[str, str]] | None:
    """The smallest cell that is a full adder, and its pin for each port of the module."""
    found = [(library.cell(name), _ports(library.cell(name))) for name in library.cell_names]
    adders = [(cell, ports) for cell, ports in found if ports is not None]
    return min(adders, key=lambda pair: pair[0].area, default=None)


def _ports(cell: Cell) -> dict[str, str] | None:
    if len(cell.inputs) != 3 or len(cell.outputs) != 2 or cell.flip_flop or cell.clock_gate:
        return None
    inputs = [pin.name for pin in cell.inputs]
    tables = {pin.name: _truth(pin.function, inputs) for pin in cell.outputs}
    bits = list(itertools.product((0, 1), repeat=3))
    wanted = {"s": [sum(b) % 2 for b in bits], "co": [sum(b) // 2 for b in bits]}
    ports = dict(zip("abc", inputs, strict=True))
    for port, table in wanted.items():
        match = [name for name, found in tables.items() if found == table]
        if not match:
            return None
        ports[port] = match[0]
    return ports


def _truth(function: str | None, inputs: Sequence[str]) -> list[int] | None:
    """Values over all inputs, the last fastest."""
    if function is None:
        return None
    text = expression(function, "v['{}']").replace("~", "1^")
    rows = itertools.product((0, 1), repeat=len(inputs))
    return [eval(text, {"v": dict(zip(inputs, row, strict=True))}) & 1 for row in rows]


def write_maps(directory: pathlib.Path, library: Library) -> None:
    """The techmap files that the commands below read."""
    cell = full_adder_cell(library)
    (directory / "plain.v").write_text(_PLAIN.replace("{keep}", "1" if cell else "0"))
    if cell is None:
        (directory / "adders.v").write_text("")
        return
    pins = ", ".join(f".{pin}({port})" for port, pin in cell[1].items())
    (directory / "adders.v").write_text(
        f'(* techmap_celltype = "{MODULE}" *)\nmodule cell_full_adder (input a, b, c, '
        f"output s, co);\n    {cell[0].name} _TECHMAP_REPLACE_ ({pins});\nendmodule\n"
    )


def before_synthesis() -> list[str]:
    """Commands between reading the Verilog and ``synth``."""
    return ["proc", "flatten", "opt", *("techmap -map plain.v", "opt") * _CONSTANTS_TRAVEL]

"""Plays a stimulus in Icarus Verilog and compares what comes out, for RTL and netlists alike."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.rtl.design import Design, Stimulus

TIMESCALE = "1ps/1ps"


def _fields(widths: Sequence[tuple[str, int]]) -> list[tuple[str, str]]:
    """Slices of a packed word, the first field lowest."""
    fields, low = [], 0
    for name, width in widths:
        fields.append((name, f"[{low + width - 1}:{low}]"))
        low += width
    return fields


def bench(
    stimulus: Stimulus,
    top: str,
    parameters: Mapping[str, int],
    *,
    period: int,
    hold: int,
    dump: str | None = None,
) -> str:
    """The test bench's text: module ``player`` reads inputs.hex, expected.hex and care.hex.

    Args:
      stimulus: the ports' values.
      top: the module under test.
      parameters: of the module; a netlist has none.
      period: of the clock, in ps.
      hold: from the clock's rising edge to the inputs' change, in ps.
      dump: a file for the value changes of the measured cycles, or nothing.
    """
    inputs = [(name, stimulus.widths[name]) for name in stimulus.inputs]
    outputs = [(name, stimulus.widths[name]) for name in stimulus.expected]
    input_bits = sum(width for _, width in inputs)
    output_bits = sum(width for _, width in outputs)
    connected = [f".{name}(now{part})" for name, part in _fields(inputs)]
    connected += [f".{name}(seen{part})" for name, part in _fields(outputs)]
    given = ", ".join(f".{name}({value})" for name, value in parameters.items())
    start, stop = stimulus.measured
    dumping = ""
    if dump:
        dumping = f"""
            if (cycle == {start}) begin $dumpfile("{dump}"); $dumpvars(0, dut); end
            if (cycle == {stop}) $dumpoff;"""
    return f"""`timescale {TIMESCALE}
module player;
    reg clock = 0;
    reg [{input_bits - 1}:0] inputs [0:{stimulus.cycles - 1}];
    reg [{output_bits - 1}:0] expected [0:{stimulus.cycles - 1}];
    reg [{output_bits - 1}:0] care [0:{stimulus.cycles - 1}];
    reg [{input_bits - 1}:0] now;
    wire [{output_bits - 1}:0] seen;
    integer cycle;
    {top} {f"#({given})" if given else ""} dut (.clock(clock), {", ".join(connected)});
    initial begin
        $readmemh("inputs.hex", inputs);
        $readmemh("expected.hex", expected);
        $readmemh("care.hex", care);
        now = inputs[0];
        #{period};
        for (cycle = 0; cycle < {stimulus.cycles}; cycle = cycle + 1) begin{dumping}
            clock = 1;
            #{hold} now = inputs[cycle];
            #{period // 2 - hold} clock = 0;
            #{period - period // 2 - 1};
            if (((seen ^ expected[cycle]) & care[cycle]) !== {output_bits}'b0)
                $display("FAIL cycle %0d: %h, expected %h", cycle, seen, expected[cycle]);
            #1;
        end
        $display("PLAYED %0d", cycle);
        $finish;
    end
endmodule
"""


def _write_words(path: Path, words: npt.NDArray) -> None:
    path.write_text("\n".join(f"{word:x}" for word in words.tolist()) + "\n")


def _join(columns: Sequence[tuple[npt.NDArray, int]]) -> npt.NDArray:
    """One Python integer a cycle from fields, the first lowest."""
    word, low = np.zeros(len(columns[0][0]), object), 0
    for values, width in columns:
        word = word + values.astype(object) * (1 << low)
        low += width
    return word


def write_stimulus(directory: Path, stimulus: Stimulus) -> None:
    """The memories that `bench` reads."""
    _write_words(
        directory / "inputs.hex",
        _join([(values, stimulus.widths[name]) for name, values in stimulus.inputs.items()]),
    )
    expected, care = [], []
    for name, (cycles, values) in stimulus.expected.items():
        width = stimulus.widths[name]
        words, masks = (np.zeros(stimulus.cycles, object) for _ in range(2))
        words[cycles] = values.astype(object)
        masks[cycles] = (1 << width) - 1
        expected.append((words, width))
        care.append((masks, width))
    _write_words(directory / "expected.hex", _join(expected))
    _write_words(directory / "care.hex", _join(care))


def play(
    stimulus: Stimulus,
    top: str,
    sources: Sequence[Path],
    parameters: Mapping[str, int],
    *,
    period: int = 1000,
    hold: int = 1,
    directory: Path | None = None,
    dump: str | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Simulates and compares.

    Raises:
      RuntimeError: it does not compile or run, or an output differs from what is expected.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as name:
            play(
                stimulus,
                top,
                sources,
                parameters,
                period=period,
                hold=hold,
                directory=Path(name),
                dump=dump,
                flags=flags,
            )
        return
    write_stimulus(directory, stimulus)
    text = bench(stimulus, top, parameters, period=period, hold=hold, dump=dump)
    (directory / "player.v").write_text(text)
    files = ["player.v", *(str(Path(source).resolve()) for source in sources)]
    compiling = ["iverilog", "-g2005", *flags, "-s", "player", "-o", "player.vvp", *files]
    for command in (compiling, ["vvp", "-n", "player.vvp"]):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if done.returncode or "FAIL" in done.stdout:
            raise RuntimeError(f"{top}: {command[0]}:\n{done.stdout[:4000]}{done.stderr[:4000]}")
    if f"PLAYED {stimulus.cycles}" not in done.stdout:
        raise RuntimeError(f"{top}: the player stopped early:\n{done.stdout[-2000:]}{done.stderr}")


def play_design(design: Design, stimulus: Stimulus) -> None:
    """Plays a design's Verilog as it stands."""
    play(stimulus, design.top, design.sources, design.parameters)

"""Runs the Verilog of the group-PE array and of the encoder in Icarus Verilog.

The RTL is the judge of the accelerator model: it implements the input-stationary array of Huang et
al. (IEEE TCAD 42(1), 2023) cycle by cycle, and whatever the model claims of values, cycles and
partial-sum traffic can be compared with what is observed here.

Why a fold takes 2R + C + T·k − 2 cycles (R rows, C columns, T filters, k slots a group; where
filters have slots of their own, Σ k of all filters in place of T·k):

* R cycles load the activations. All columns load at once, each taking one group (g activations)
  a cycle at its top, which moves down a row a cycle: the deepest row's group enters first. So the
  edge must supply C·g activations a cycle; that is the parallel load the formula assumes.
* T·k cycles stream the terms. Row r starts r cycles after row 0 and column c sees them c cycles
  later, so the bottom right element works from cycle R + (R−1) + (C−1) on, for T·k cycles.
* Nothing else. The skew between rows is one cycle although a group lasts k: in a group's last slot
  an element adds its own sum and the one from above, which was registered just then. The price is
  a second, wide adder in each element, in series with the first in that slot. With a single adder
  seeded by the sum from above, the rows would have to run k cycles apart, and a fold would take
  (R−1)(k−1) cycles more.
* Reading weights and encoding them take a cycle, hidden by the last cycle of loading; storing the
  last sums is hidden by the next fold's first cycle. Folds do not overlap otherwise: activations
  are single-buffered in the elements.

With ``lanes`` L above 1 the elements are those of gpe_lanes.v: a filter of k slots takes ⌈k/L⌉
passes, one a cycle, and a fold 2R + C − 2 cycles and the passes of its filters. Every pass has a
partial sum of its own on the way down; those of a filter are added below the bottom row, so that no
element accumulates and the skew between rows stays one cycle.

Row folds of one column fold follow each other; the sums of the earlier ones are read from the
output buffer and enter at the top of the columns, so accumulating over folds costs reads, P·M for
each row fold but the first, and no cycles.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stp_jax.hwmodel.rtl import images
from stp_jax.hwmodel.rtl.images import Job
from stp_jax.terms import slot_format
from stp_jax.terms.groups import group_count

SOURCES = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResult:
    """Observations of one job on the array.

    Attributes:
      outputs: int64 [P, M], the 32-bit sums in the output buffer.
      cycles: from the first activation loaded to the last sum completed, all folds.
      psum_reads: partial sums read from the output buffer (real pixels only).
      psum_writes: partial sums written to it.
      slots: term slots that entered the array's rows, empty ones included.
    """

    outputs: npt.NDArray[np.int64]
    cycles: int
    psum_reads: int
    psum_writes: int
    slots: int


def icarus_available() -> bool:
    """Whether Icarus Verilog's compiler and simulator are on PATH."""
    return shutil.which("iverilog") is not None and shutil.which("vvp") is not None


def run_bench(
    bench: str, parameters: Mapping[str, int], directory: pathlib.Path, *plusargs: str
) -> list[str]:
    """Compiles and runs one test bench in ``directory``; returns the lines it printed."""
    if not icarus_available():
        raise FileNotFoundError(
            "iverilog and vvp are not on PATH; install Icarus Verilog (apt-get install iverilog)"
        )
    program = directory / f"{bench}.vvp"
    defines = [f"-P{bench}.{name}={value}" for name, value in parameters.items()]
    sources = sorted(str(path) for path in SOURCES.glob("*.v"))
    compile_command = ["iverilog", "-g2005", "-s", bench, "-o", str(program), *defines, *sources]
    printed = ""
    for command in (compile_command, ["vvp", "-n", str(program), *plusargs]):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        printed = done.stdout
        if done.returncode or done.stderr or "FAIL" in printed:
            raise RuntimeError(f"{command[0]} failed on {bench}:\n{printed}{done.stderr}")
    return printed.splitlines()


def simulate_encoder(bits: int = 8) -> npt.NDArray[np.int64]:
    """The encoder's digits for every value of the width.

    Args:
      bits: width of the two's complement input, from 2 to 16.

    Returns:
      int64 digits [2**bits, bits] in {-1, 0, 1}, least significant first; row n belongs to the
      value ``n - 2**(bits - 1)``.

    Raises:
      ValueError: bits out of range.
      FileNotFoundError: Icarus Verilog is not installed.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be from 2 to 16, got {bits}")
    with tempfile.TemporaryDirectory() as directory:
        lines = run_bench("tb_naf_encoder", {"WIDTH": bits}, pathlib.Path(directory))
    fields = [line.split() for line in lines]
    values = np.array([int(value) for value, _, _ in fields], np.int64)
    if not np.array_equal(values, np.arange(-(1 << (bits - 1)), 1 << (bits - 1))):
        raise RuntimeError("the encoder's test bench did not print every value in order")
    masks = np.array([[int(plus, 16), int(minus, 16)] for _, plus, minus in fields], np.int64)
    planes = masks[:, :, None] >> np.arange(bits, dtype=np.int64)[None, None, :] & 1
    return planes[:, 0] - planes[:, 1]


def simulate_weight_edge(groups: npt.NDArray[np.integer], *, slots: int) -> npt.NDArray[np.uint32]:
    """Streams groups of int8 weights through the encoders and the serialiser, back to back.

    Args:
      groups: integers [N, g] in [-128, 127]; a group may have more terms than slots, the
        serialiser then keeps the largest.
      slots: k, slots for each group.

    Returns:
      uint32 wire slots [N, slots], one for each cycle; bits below valid mean nothing in empty
      slots and are cleared here.

    Raises:
      ValueError: not a matrix, or values outside int8.
      FileNotFoundError: Icarus Verilog is not installed.
    """
    if groups.ndim != 2 or groups.shape[1] < 2:
        raise ValueError(f"groups must be [N, g] with g of at least 2, got shape {groups.shape}")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    count, group_size = groups.shape
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        images.write_weights(directory / "weights.hex", groups)
        bits = slot_format(group_size, slots, images.BITS).wire_bits
        parameters = {"GROUP": group_size, "SLOTS": slots, "GROUPS": count, "SLOT_BITS": bits}
        lines = run_bench("tb_weight_edge", parameters, directory)
    words = np.array([int(line, 16) for line in lines], np.uint32).reshape(count, slots)
    valid = words >> np.uint32(bits - 1) == 1
    return np.where(valid, words, np.uint32(0))


def simulate_array(
    jobs: Sequence[Job],
    *,
    rows: int,
    cols: int,
    group_size: int,
    lanes: int = 1,
    encode_at_edge: bool = False,
    waveform: str | pathlib.Path | None = None,
) -> list[JobResult]:
    """Runs matrix products on the input-stationary array of group PEs, one after another.

    Args:
      jobs: at least one job; they share the array, each has its own sizes and budget.
      rows: R, at least 1.
      cols: C, at least 1.
      group_size: g, activations resident in a PE, at least 2.
      lanes: L, terms that a PE takes in a cycle; from 2 on, PEs are those of gpe_lanes.v.
      encode_at_edge: False streams term slots; True stores weights as int8 and encodes
        them at the array's edge.
      waveform: a VCD file to write, every signal of the array cycle by cycle, for a viewer such as
        GTKWave or Surfer; it is large for more than a small job.

    Returns:
      One result a job, in order.

    Raises:
      ValueError: sizes out of range, a group over its budget, or weights that cannot be stored.
      FileNotFoundError: Icarus Verilog is not installed.
      RuntimeError: the simulation failed or did not end.
    """
    if rows < 1 or cols < 1 or group_size < 2 or lanes < 1 or not jobs:
        raise ValueError(
            "rows, cols and lanes must be at least 1, group_size at least 2, with at least one "
            f"job; got rows={rows}, cols={cols}, lanes={lanes}, group_size={group_size}, "
            f"{len(jobs)} jobs"
        )
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        parameters = images.write_images(
            directory,
            list(jobs),
            rows=rows,
            cols=cols,
            group_size=group_size,
            encode_at_edge=encode_at_edge,
            lanes=lanes,
        )
        parameters |= {
            "ROWS": rows,
            "COLUMNS": cols,
            "GROUP": group_size,
            "LANES": lanes,
            "ENCODE": int(encode_at_edge),
            "SLOT_BITS": slot_format(group_size, 2, images.BITS).wire_bits,
        }
        parameters["MAX_CYCLES"] = sum(hang_limit(job, rows, cols, group_size) for job in jobs)
        plusargs = [] if waveform is None else ["+waveform=waves.vcd"]
        run_bench("tb_gpe_array", parameters, directory, *plusargs)
        if waveform is not None:
            shutil.move(directory / "waves.vcd", waveform)
        counts = np.loadtxt(directory / "results.txt", dtype=np.int64, ndmin=2)
        outputs = _read_outputs(directory / "outputs.hex")
    ends = np.cumsum([job.weights.shape[0] * job.activations.shape[0] for job in jobs])
    return [
        JobResult(
            outputs=words.reshape(job.activations.shape[0], job.weights.shape[0]),
            cycles=int(cycles),
            psum_reads=int(reads),
            psum_writes=int(writes),
            slots=int(slots) * lanes,
        )
        for job, words, (cycles, reads, writes, slots) in zip(
            jobs, np.split(outputs, ends[:-1]), counts, strict=True
        )
    ]


def hang_limit(job: Job, rows: int, cols: int, group_size: int) -> int:
    """Far more cycles than any schedule could need: reaching it means that the RTL hangs."""
    (filters, reduction), pixels = job.weights.shape, job.activations.shape[0]
    fold_count = group_count(reduction, rows * group_size) * group_count(pixels, cols)
    return 4 * fold_count * (rows + cols + filters + 1) * (int(np.max(job.budget)) + 1)


def read_words(path: pathlib.Path) -> list[int]:
    """Words that the simulation wrote with ``$writememh``; undefined bits (x) are an error."""
    lines = [line for line in path.read_text().split("\n") if line and not line.startswith("//")]
    if any("x" in line.lower() for line in lines):
        raise RuntimeError(f"the array left a word of {path.name} unwritten or undefined")
    return [int(line, 16) for line in lines]


def _read_outputs(path: pathlib.Path) -> npt.NDArray[np.int64]:
    """The output buffer as signed numbers."""
    return np.array(read_words(path), np.uint32).view(np.int32).astype(np.int64)

"""The group-PE array behind AXI4-Streams (gpe_array_axis.v), run in Icarus Verilog."""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import numpy.typing as npt

from stp_jax.hwmodel.rtl import images
from stp_jax.hwmodel.rtl.images import Job
from stp_jax.hwmodel.rtl.simulate import hang_limit, read_words, run_bench
from stp_jax.terms import slot_format

PAUSES_IN = 16  # the test bench draws pauses in sixteenths of the cycles


def simulate_stream(
    job: Job,
    *,
    rows: int,
    cols: int,
    group_size: int,
    depth: int = 16,
    pauses: int = 0,
    seed: int = 1,
) -> tuple[npt.NDArray[np.int64], int]:
    """Runs a matrix product through the streams of ``gpe_array_axis``, all its folds.

    Args:
      job: weights, activations and budgets.
      rows: R, at least 1.
      cols: C, at least 1.
      group_size: g, activations resident in a PE, at least 2.
      depth: filters whose sums may be on their way or wait, a power of two.
      pauses: sixteenths of the cycles, from 0 to 15, in which a stream has nothing to give or
        takes nothing, drawn for each stream by itself.
      seed: of these draws.

    Returns:
      outputs, int64 [P, M], and the cycles from the first activations taken to the last sums.

    Raises:
      ValueError: a size is out of range, or what `wire_slots` refuses.
      FileNotFoundError: Icarus Verilog is not installed.
      RuntimeError: the simulation failed, did not end, or marked another beat as a fold's last.
    """
    if rows < 1 or cols < 1 or group_size < 2:
        raise ValueError(
            "rows and cols must be at least 1, group_size at least 2; got "
            f"rows={rows}, cols={cols}, group_size={group_size}"
        )
    if depth < 2 or depth & (depth - 1):
        raise ValueError(f"depth must be a power of two from 2 on, got {depth}")
    if not 0 <= pauses < PAUSES_IN:
        raise ValueError(f"pauses must be from 0 to {PAUSES_IN - 1}, got {pauses}")
    resident = images.activation_groups(job, rows=rows, cols=cols, group_size=group_size)
    row_folds, column_folds = resident.shape[:2]
    filters, pixels = job.weights.shape[0], job.activations.shape[0]
    slots = _slot_beats(job, rows=rows, group_size=group_size)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        # Folds along the reduction follow each other; row R-1's activations enter first.
        in_order = resident.swapaxes(0, 1)[:, :, ::-1]
        beats = in_order.reshape(-1, cols * group_size)
        activation_beats = images.write_lines(
            directory / "activation_beats.hex", images.byte_lines(beats)
        )
        slot_beats = images.write_lines(directory / "slot_beats.hex", slots * column_folds)
        parameters = {
            "ROWS": rows,
            "COLUMNS": cols,
            "GROUP": group_size,
            "LOG_DEPTH": depth.bit_length() - 1,
            "SLOT_BITS": slot_format(group_size, 2, images.BITS).wire_bits,
            "PAUSES": pauses,
            "SEED": seed,
            "FILTERS": filters,
            "ROW_FOLDS": row_folds,
            "ACTIVATION_BEATS": activation_beats,
            "SLOT_BEATS": slot_beats,
            "SUM_BEATS": row_folds * column_folds * filters,
            "MAX_CYCLES": PAUSES_IN * hang_limit(job, rows, cols, group_size),
        }
        cycles = int(run_bench("tb_gpe_array_axis", parameters, directory)[-1])
        lasts, sums = _sums(read_words(directory / "sums.hex"), cols)
    if not np.array_equal(np.flatnonzero(lasts) % filters, np.full(lasts.sum(), filters - 1)):
        raise RuntimeError("gpe_array_axis marked a beat that is not its fold's last")
    by_fold = sums.reshape(column_folds, row_folds, filters, cols)[:, -1]
    outputs = by_fold.swapaxes(1, 2).reshape(-1, filters)[:pixels]
    return outputs, cycles


def _slot_beats(job: Job, *, rows: int, group_size: int) -> list[str]:
    """Beats of one column fold, as hex: the slots of all rows, tuser and tlast on top."""
    bits = slot_format(group_size, 2, images.BITS).wire_bits
    groups = images.weight_groups(job, rows=rows, group_size=group_size)
    by_filter = images.filter_slots(groups, job.filter_budgets)
    shifts = np.array([1 << bits * row for row in range(rows)], np.object_)
    tuser, tlast = 1 << bits * rows, 2 << bits * rows
    beats: list[int] = []
    for fold in range(len(groups)):
        for words in by_filter:
            beats += (words[fold].T.astype(np.object_) * shifts).sum(axis=-1).tolist()
            beats[-1] |= tuser
        beats[-1] |= tlast
    return [f"{beat:x}" for beat in beats]


def _sums(words: list[int], cols: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """tlast [beats] and the columns' signed sums [beats, C]."""
    raw = b"".join((word % (1 << 32 * cols)).to_bytes(4 * cols, "little") for word in words)
    sums = np.frombuffer(raw, "<i4").reshape(len(words), cols).astype(np.int64)
    return np.array([word >> 32 * cols for word in words], np.int64), sums

"""Memory traffic: SRAM accesses, DRAM bytes, and the stalls of a double-buffered hierarchy.

SRAM and filter-DRAM counts are SCALE-Sim's (Samajdar et al., ISPASS 2020), which never counts the
reads of partial sums; they are counted here, apart. Input DRAM reads are those of an ideal buffer:
where the inputs do not fit, SCALE-Sim reads the overlap of neighbouring windows again. Folds run
column folds outermost. Words are bytes, partial sums 4 bytes; the last pass writes the requantised
byte.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stp_jax.hwmodel.arrays import Array, Folding
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numeric import as_real, smooth_maximum, smooth_step

PARTIAL_SUM_BYTES = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts in words and bytes, real vectors over layers."""

    accesses: dict[str, Any]  # words
    sram_bytes: dict[str, Any]  # by buffer: what passes its port, fills from DRAM included
    dram_bytes: Any
    first_fill_bytes: Any  # operands of the first fold, which nothing hides


def traffic(
    network: Network,
    array: Array,
    folding: Folding,
    weight_bits: Any,
    xp: Any,
    smoothing: float = 0.0,
) -> Traffic:
    """Counts every layer's accesses.

    A buffer holds an operand if it is smaller than the active half (strictly, as in SCALE-Sim);
    otherwise DRAM serves every pass over it. Partial sums leave the chip only if those alive in
    one column fold exceed the half.

    Args:
      network: the layers.
      array: sizes of the buffers, dataflow.
      folding: of the network onto the array.
      weight_bits: stored bits of one weight, real vector over layers.
      xp: array namespace.
      smoothing: width of the step where weights outgrow their buffer; 0 for a sharp one.
    """
    groups, K, P, M = folding.groups, folding.K, folding.P, folding.M
    row_folds, col_folds = folding.row_folds, folding.col_folds
    once = xp.ones_like(K)
    # Passes of the array over: the inputs, the weights, the outputs.
    input_passes, weight_passes, output_passes = {
        "is": (once, col_folds, row_folds),
        "ws": (col_folds, once, row_folds),
        "os": (col_folds, row_folds, once),
    }[array.dataflow]
    input_folds, weight_folds = {
        "is": (row_folds * col_folds, row_folds),
        "ws": (row_folds, row_folds * col_folds),
        "os": (row_folds, col_folds),
    }[array.dataflow]
    outputs = groups * P * M
    accesses = {
        "sram_ifmap_read": groups * K * P * input_passes,
        "sram_filter_read": groups * K * M * weight_passes,
        "sram_ofmap_write": outputs * output_passes,
        "sram_psum_read": outputs * (output_passes - 1.0),
    }
    inputs = as_real(network.extents("input_words"), xp)
    weight_bytes = weight_bits / 8.0
    fits_inputs = inputs / groups < as_real(array.ifmap_sram, xp) / 2.0
    # Outputs resident: one column fold's filters serve all its row folds.
    reused_filters = xp.minimum(folding.cols, M) if array.dataflow == "os" else M
    room = as_real(array.filter_sram, xp) / 2.0
    overflow = smooth_step(K * reused_filters * weight_bytes, room, smoothing, xp)
    alive = (
        PARTIAL_SUM_BYTES
        * {
            "is": xp.minimum(folding.cols, P) * M,
            "ws": xp.minimum(folding.cols, M) * P,
            "os": xp.zeros_like(P),
        }[array.dataflow]
    )
    spills = xp.where(alive < as_real(array.ofmap_sram, xp) / 2.0, 0.0, accesses["sram_psum_read"])
    accesses |= {
        "dram_ifmap_read": inputs * xp.where(fits_inputs, once, input_passes),
        "dram_filter_read": groups * K * M * (1.0 + overflow * (weight_passes - 1.0)),
        "dram_ofmap_write": outputs + spills,
        "dram_psum_read": spills,
    }
    dram_inputs, dram_weights = accesses["dram_ifmap_read"], accesses["dram_filter_read"]
    partial = accesses["sram_psum_read"] * PARTIAL_SUM_BYTES
    return Traffic(
        accesses=accesses,
        sram_bytes={
            "ifmap": accesses["sram_ifmap_read"] + dram_inputs,
            "filter": (accesses["sram_filter_read"] + dram_weights) * weight_bytes,
            "ofmap": 2.0 * partial + 2.0 * (outputs + spills * PARTIAL_SUM_BYTES),
        },
        dram_bytes=dram_inputs
        + dram_weights * weight_bytes
        + outputs
        + 2.0 * spills * PARTIAL_SUM_BYTES,
        first_fill_bytes=inputs / (groups * input_folds) + K * M * weight_bytes / weight_folds,
    )


def memory_cycles(array: Array, moved: Traffic, xp: Any, smoothing: float) -> Any:
    """Cycles that DRAM or the busiest SRAM port needs for its bytes, shape (layers,).

    DRAM's are those that may overlap the computation, after the fill of the first fold.
    """
    ports = as_real(array.sram_bandwidth, xp)
    overlapped = xp.maximum(moved.dram_bytes - moved.first_fill_bytes, 0.0)
    cycles = overlapped / as_real(array.dram_bandwidth, xp)
    for transferred in moved.sram_bytes.values():
        cycles = smooth_maximum(cycles, transferred / ports, smoothing, xp)
    return cycles

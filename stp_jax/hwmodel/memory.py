"""Memory traffic: SRAM accesses, DRAM bytes, and the stalls of a double-buffered hierarchy.

SRAM and filter-DRAM counts are SCALE-Sim's (Samajdar et al., ISPASS 2020), which never counts the
reads of partial sums; they are counted here, apart. Input DRAM reads are those of an ideal buffer:
where the inputs do not fit, SCALE-Sim reads the overlap of neighbouring windows again. Folds run
column folds outermost. Words are bytes, partial sums 4 bytes; the last pass writes the requantised
byte.
"""

from __future__ import annotations

import dataclasses

from stp_jax.hwmodel.arrays import Array
from stp_jax.hwmodel.folding import Folding
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import Real, Vector, as_real, namespace_of
from stp_jax.hwmodel.smoothing import smooth_maximum, smooth_step

PARTIAL_SUM_BYTES = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts in words and bytes, real vectors over layers."""

    accesses: dict[str, Vector]  # words
    sram_bytes: dict[str, Vector]  # by buffer: what passes its port, fills from DRAM included
    dram_bytes: Vector
    first_fill_bytes: Vector  # operands of the first fold, which nothing hides


def traffic(
    network: Network,
    array: Array,
    folding: Folding,
    weight_bits: Real,
    smoothing: float = 0.0,
) -> Traffic:
    """Counts every layer's accesses.

    A buffer holds an operand if it is smaller than the active half (strictly, as in SCALE-Sim);
    otherwise DRAM serves every pass over it. Partial sums leave the chip only if those alive in
    one column fold exceed the half.

    Args:
      network: the layers.
      array: sizes of the buffers, dataflow; its numbers are arrays.
      folding: of the network onto the array.
      weight_bits: stored bits of one weight, of all layers or one a layer.
      smoothing: width of the step where weights outgrow their buffer; 0 for a sharp one.
    """
    xp = namespace_of(folding.K)
    groups, K, P, M = folding.groups, folding.K, folding.P, folding.M
    row_folds, col_folds = folding.row_folds, folding.col_folds
    once = xp.ones_like(K)
    # Passes of the array over: the inputs, the weights, the outputs. The resident operand is read
    # once, the other once for each fold of the resident one's other extent.
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
    fits_inputs = inputs / groups < array.ifmap_sram / 2.0
    # Outputs resident: one column fold's filters serve all its row folds.
    reused_filters = xp.minimum(folding.cols, M) if array.dataflow == "os" else M
    room = array.filter_sram / 2.0
    overflow = smooth_step(K * reused_filters * weight_bytes, room, smoothing)
    alive = (
        PARTIAL_SUM_BYTES
        * {
            "is": xp.minimum(folding.cols, P) * M,
            "ws": xp.minimum(folding.cols, M) * P,
            "os": xp.zeros_like(P),
        }[array.dataflow]
    )
    # Several arrays take what DRAM reads again at the same time.
    dram_input_passes, dram_weight_passes = {
        "is": (once, folding.col_rounds),
        "ws": (folding.col_rounds, once),
        "os": (folding.col_rounds, row_folds),
    }[array.dataflow]
    spills = xp.where(alive < array.ofmap_sram / 2.0, 0.0, accesses["sram_psum_read"])
    accesses |= {
        "dram_ifmap_read": inputs * xp.where(fits_inputs, once, dram_input_passes),
        "dram_filter_read": groups * K * M * (1.0 + overflow * (dram_weight_passes - 1.0)),
        "dram_ofmap_write": outputs + spills,
        "dram_psum_read": spills,
    }
    first_inputs, first_weights = (
        inputs / (groups * input_folds),
        K * M * weight_bytes / weight_folds,
    )
    # Arrays beside each other differ in the operand along the columns.
    busy = xp.minimum(as_real(array.count, xp), groups * col_folds)
    if array.dataflow == "is":
        first_inputs = first_inputs * busy
    else:
        first_weights = first_weights * busy
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
        first_fill_bytes=first_inputs + first_weights,
    )


def memory_cycles(array: Array, moved: Traffic, share: Vector, smoothing: float) -> Vector:
    """Cycles that DRAM or the busiest SRAM port needs for its bytes, shape (layers,).

    DRAM's are those that may overlap the computation, after the fill of the first fold. ``share``
    of the SRAM's bytes pass the ports of the busiest array.
    """
    overlapped = namespace_of(moved.dram_bytes).maximum(
        moved.dram_bytes - moved.first_fill_bytes, 0.0
    )
    cycles = overlapped / array.dram_bandwidth
    for transferred in moved.sram_bytes.values():
        of_the_busiest = transferred * share / array.sram_bandwidth
        cycles = smooth_maximum(cycles, of_the_busiest, smoothing)
    return cycles

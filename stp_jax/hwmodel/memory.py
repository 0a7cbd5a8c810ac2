"""Memory traffic: SRAM accesses, DRAM bytes, and the stalls of a double-buffered hierarchy.

SRAM and filter-DRAM counts are SCALE-Sim's (Samajdar et al., ISPASS 2020), which never counts the
reads of partial sums; they are counted here, apart. Input DRAM reads are those of an ideal buffer:
where the inputs do not fit, SCALE-Sim reads the overlap of neighbouring windows again. Folds run
column folds outermost. The last pass writes the requantised output. Widths are those of `Widths`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from stp_jax.hwmodel.arrays import Array
from stp_jax.hwmodel.folding import Folding
from stp_jax.hwmodel.network import Network
from stp_jax.hwmodel.numbers import Real, Vector, as_real, namespace_of
from stp_jax.hwmodel.smoothing import smooth_maximum, smooth_step
from stp_jax.hwmodel.tensors import Sources, Tensors

SHARED_BUFFER = "activation"  # that of several arrays together; the others are each array's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts in words and bytes, real vectors over layers."""

    accesses: dict[str, Vector]  # words
    sram_bytes: dict[str, Vector]  # by buffer: what passes its port, fills from DRAM included
    dram_bytes: dict[str, Vector]  # by operand: ifmap, filter, ofmap, psum
    first_fill_bytes: Vector  # operands of the first fold from DRAM, which nothing hides

    @property
    def all_dram_bytes(self) -> Vector:
        """Those of all operands."""
        first, *others = self.dram_bytes.values()
        return sum(others, first)


def traffic(
    network: Network,
    array: Array,
    folding: Folding,
    weight_bits: Real,
    smoothing: float = 0.0,
) -> Traffic:
    """Counts every layer's accesses.

    A buffer holds an operand if it is smaller than the active half (strictly, as in SCALE-Sim);
    otherwise it is read in every pass over it, from DRAM, or from the activation buffer where the
    layer that wrote it left it there. Partial sums leave the chip only if those alive in one column
    fold exceed the half.

    Args:
      network: the layers.
      array: sizes of the buffers, dataflow; its numbers are arrays.
      folding: of the network onto the array.
      weight_bits: stored bits of one weight, of all layers or one a layer, where the array's
        widths do not say otherwise.
      smoothing: width of the step where weights outgrow their buffer, or outputs that of
        activations; 0 for a sharp one.
    """
    xp = namespace_of(folding.K)
    groups, K, P, M = folding.groups, folding.K, folding.P, folding.M
    row_folds = folding.row_folds
    once = xp.ones_like(K)
    outputs = groups * P * M
    accesses = _array_accesses(folding)
    inputs = as_real(network.extents("input_words"), xp)
    on_dram, on_chip = (width.bytes(weight_bits) for width in (array.dram_bits, array.sram_bits))
    fits_inputs = inputs * on_chip.inputs / groups < array.ifmap_sram / 2.0
    # Outputs resident: one column fold's filters serve all its row folds.
    reused_filters = xp.minimum(folding.cols, M) if array.dataflow == "os" else M
    room = array.filter_sram / 2.0
    overflow = smooth_step(K * reused_filters * on_chip.weights, room, smoothing)
    alive = (
        on_chip.partial_sums
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
    fetched_inputs = inputs * xp.where(fits_inputs, once, dram_input_passes)
    fetched_weights = groups * K * M * (1.0 + overflow * (dram_weight_passes - 1.0))
    stays = stay_on_chip(network.tensors, array, smoothing)
    accesses |= {
        "sram_activation_read": fetched_inputs * stays.inputs + fetched_weights * stays.operands,
        "sram_activation_write": outputs * stays.outputs,
        "dram_ifmap_read": fetched_inputs * (1.0 - stays.inputs),
        "dram_filter_read": fetched_weights * (1.0 - stays.operands),
        "dram_ofmap_write": outputs * stays.written + spills,
        "dram_psum_read": spills,
    }
    partial_sums = accesses["sram_psum_read"] + spills
    shared = accesses["sram_activation_read"] + accesses["sram_activation_write"]
    return Traffic(
        accesses=accesses,
        sram_bytes={
            "ifmap": (accesses["sram_ifmap_read"] + fetched_inputs) * on_chip.inputs,
            "filter": (accesses["sram_filter_read"] + fetched_weights) * on_chip.weights,
            "ofmap": 2.0 * (partial_sums * on_chip.partial_sums + outputs * on_chip.outputs),
            SHARED_BUFFER: shared * on_chip.outputs,
        },
        dram_bytes={
            "ifmap": accesses["dram_ifmap_read"] * on_dram.inputs,
            "filter": accesses["dram_filter_read"] * on_dram.weights,
            "ofmap": outputs * stays.written * on_dram.outputs,
            "psum": 2.0 * spills * on_dram.partial_sums,
        },
        first_fill_bytes=_first_fill(
            array,
            folding,
            inputs * (1.0 - stays.inputs) * on_dram.inputs,
            groups * K * M * (1.0 - stays.operands) * on_dram.weights,
        ),
    )


def _array_accesses(folding: Folding) -> dict[str, Vector]:
    """Words that the array itself reads and writes, in all its passes.

    The resident operand is read once, the other once for each fold of the resident one's other
    extent.
    """
    once = namespace_of(folding.K).ones_like(folding.K)
    input_passes, weight_passes, output_passes = {
        "is": (once, folding.col_folds, folding.row_folds),
        "ws": (folding.col_folds, once, folding.row_folds),
        "os": (folding.col_folds, folding.row_folds, once),
    }[folding.dataflow]
    outputs = folding.groups * folding.P * folding.M
    return {
        "sram_ifmap_read": folding.groups * folding.K * folding.P * input_passes,
        "sram_filter_read": folding.groups * folding.K * folding.M * weight_passes,
        "sram_ofmap_write": outputs * output_passes,
        "sram_psum_read": outputs * (output_passes - 1.0),
    }


def _first_fill(array: Array, folding: Folding, inputs: Vector, weights: Vector) -> Vector:
    """Bytes of the first fold, of the inputs and the weights that come from DRAM."""
    row_folds, col_folds = folding.row_folds, folding.col_folds
    input_folds, weight_folds = {
        "is": (row_folds * col_folds, row_folds),
        "ws": (row_folds, row_folds * col_folds),
        "os": (row_folds, col_folds),
    }[array.dataflow]
    first_inputs = inputs / (folding.groups * input_folds)
    first_weights = weights / (folding.groups * weight_folds)
    # Arrays beside each other differ in the operand along the columns.
    xp = namespace_of(folding.K)
    busy = xp.minimum(as_real(array.count, xp), folding.groups * col_folds)
    if array.dataflow == "is":
        return first_inputs * busy + first_weights
    return first_inputs + first_weights * busy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stays:
    """Shares of each layer's tensors that the activation buffer holds, real vectors over layers."""

    outputs: Vector
    written: Vector  # of the outputs, what goes to DRAM
    inputs: Vector
    operands: Vector  # of the second operand, which is weights for most layers


def stay_on_chip(tensors: Tensors, array: Array, smoothing: float) -> Stays:
    """Which outputs stay in the activation buffer until their last reader (see `Tensors.room`)."""
    xp = namespace_of(array.activation_sram, array.sram_bits.outputs)
    useful = np.isfinite(tensors.room)
    room = xp.where(useful, as_real(np.where(useful, tensors.room, 1.0), xp), 1.0)
    fits = smooth_step(array.activation_sram, room * array.sram_bits.outputs / 8.0, smoothing)
    outputs = xp.where(useful & (array.activation_sram > 0.0), fits, 0.0)

    def share(sources: Sources) -> Vector:
        return (as_real(sources.share, xp) * outputs[sources.index]).sum(axis=-1)

    return Stays(
        outputs=outputs,
        written=xp.where(tensors.leaves, 1.0, 1.0 - outputs),
        inputs=share(tensors.inputs),
        operands=share(tensors.operands),
    )


def port_bytes(sram_bytes: dict[str, Vector], share: Vector) -> list[Vector]:
    """Bytes through each buffer's port: of the busiest array, whose share of all this is."""
    return [n if name == SHARED_BUFFER else n * share for name, n in sram_bytes.items()]


def memory_cycles(array: Array, moved: Traffic, share: Vector, smoothing: float) -> Vector:
    """Cycles that DRAM or the busiest SRAM port needs for its bytes, shape (layers,).

    DRAM's are those that may overlap the computation, after the fill of the first fold. ``share``
    of the bytes of each array's own buffers pass the ports of the busiest array.
    """
    of_dram = moved.all_dram_bytes
    overlapped = namespace_of(of_dram).maximum(of_dram - moved.first_fill_bytes, 0.0)
    cycles = overlapped / array.dram_bandwidth
    for transferred in port_bytes(moved.sram_bytes, share):
        cycles = smooth_maximum(cycles, transferred / array.sram_bandwidth, smoothing)
    return cycles
